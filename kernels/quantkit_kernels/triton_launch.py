"""Launches of Triton kernels that have been launched before.

Triton asks at each launch what kind each argument is and whether any global has changed, then looks the variant up:
47 us on one machine. Here the arguments' kinds are the key themselves, with the constants: the variant is the one that
Triton chose when it first saw them.
"""

from typing import Any

from torch import Tensor


class Launcher:
    """One kernel, whose run-time arguments come first and constants last; `variants` are those compiled so far."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.variants: dict[tuple[Any, ...], Any] = {}

    def __call__(
        self,
        grid: tuple[int, int],
        arguments: tuple[Tensor | int | float | None, ...],
        constants: tuple[Any, ...],
        *,
        num_warps: int,
        early: bool,
    ) -> None:
        """Launch grid[0] · grid[1] programs. early: may start while the kernel before ends, and waits by itself."""
        key = (constants, num_warps, early, *map(_kind, arguments))
        variant = self.variants.get(key)
        if variant is not None:
            variant[(*grid, 1)](*arguments, *constants)
            return
        variant = self.kernel[grid](*arguments, *constants, num_warps=num_warps, launch_pdl=early)
        if variant is not None:  # the interpreter compiles nothing
            self.variants[key] = variant


def _kind(argument: Tensor | int | float | None) -> Any:
    """All that Triton makes variants for.

    Of a tensor, what it holds and whether it is aligned; of an integer, its width, whether it is 1, and whether 16
    divides it.
    """
    if isinstance(argument, Tensor):
        return argument.dtype, argument.device.index, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, -(2**31) <= argument < 2**31
    return type(argument)
