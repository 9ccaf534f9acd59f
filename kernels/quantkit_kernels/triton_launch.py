"""Launches of Triton kernels that have been launched before.

Triton asks at each launch what kind each argument is and whether any global has changed, then looks the variant up:
28 us on one machine, where torch.add takes 10. Here the arguments' kinds are the key, with the constants: the
variant is the one that Triton chose when it first saw them, and a launch takes 16 us. Hooks of Triton's profiler see
first launches only.
"""

from typing import Any

import torch
from torch import Tensor


def power_above(number: int) -> int:
    """The smallest power of two that is not below; Triton's own takes 3 us."""
    return 1 << (number - 1).bit_length()


def num_parts(size: int, part: int) -> int:
    """Parts that cover `size`; Triton's own `cdiv` takes 3 us."""
    return -(-size // part)


class Launcher:
    """One kernel, whose run-time arguments come first and constants last; `variants` are those compiled so far."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.variants: dict[tuple[Any, ...], Any] = {}

    def __call__(
        self,
        grid: tuple[int, int],
        arguments: tuple[Any, ...],
        constants: tuple[Any, ...],
        *,
        num_warps: int,
        early: bool,
    ) -> None:
        """Launch grid[0] · grid[1] programs on the current stream of the first argument's device, the current one.

        arguments: tensors, integers, floats and None. early: may start while the kernel before ends, and waits by
        itself.
        """
        device = arguments[0].device.index
        key = _key(arguments, constants, num_warps, early, device)
        variant = self.variants.get(key)
        if variant is not None:
            stream = torch._C._cuda_getCurrentRawStream(device)
            how = (variant.function, variant.packed_metadata, None, None, None)
            variant.run(*grid, 1, stream, *how, *arguments, *constants)
            return
        variant = self.kernel[grid](*arguments, *constants, num_warps=num_warps, launch_pdl=early)
        if variant is not None:  # the interpreter compiles nothing
            self.variants[key] = variant


def _key(arguments: tuple[Any, ...], *others: Any) -> tuple[Any, ...]:
    """All that Triton makes variants for.

    Of a tensor, what it holds and whether 16 bytes divide its address; of an integer, whether it is 1, whether 16
    divides it, and its bits above 31.
    """
    key = list(others)
    for argument in arguments:
        kind = type(argument)
        if issubclass(kind, Tensor):
            key.append(argument.dtype)
            key.append(argument.data_ptr() & 15)
        elif kind is int:
            key.append(-1 if argument == 1 else argument & 15 == 0)
            key.append(argument >> 31)
        else:
            key.append(kind)
    return tuple(key)
