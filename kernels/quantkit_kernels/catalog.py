"""Which kernel multiplies which weight: two tables, read from the top, first match wins.

The choice is made once, when a layer is built; a layer may hold one kernel for few rows (decode) and one for
many (prefill).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit_kernels import dequantize, int4pack, int8_int8, int8pack
from quantkit_kernels.weight import LinearWeight


@dataclass(frozen=True, slots=True)
class Kernel:
    """prepare(weight, dtype) -> operand; run(x, operand) -> y. max_rows: the M up to which it is the fastest."""

    name: str
    max_rows: int | None
    supports: Callable[[LinearWeight, torch.dtype], bool]
    prepare: Callable[[LinearWeight, torch.dtype], Any]
    run: Callable[..., Tensor]


# Inputs in floating point. The limits on M are against dequantizing the same weight, measured on a 2-core
# AVX-512 CPU: 4096 x 4096, M = 16: int4pack 3.1 ms, int8pack 3.1 ms, dequantize + bf16 matmul about 6 ms.
FLOAT_INPUT = (
    Kernel("int4pack", 24, int4pack.supports, int4pack.prepare, int4pack.run),
    Kernel("int8pack", 24, int8pack.supports, int8pack.prepare, int8pack.run),
    Kernel("dequantize", None, dequantize.supports, dequantize.prepare, dequantize.run),
)

# Inputs as int8 codes with their scale: run(codes, scale, zero_point, operand).
INT8_INPUT = (Kernel("int8_int8", None, int8_int8.supports, int8_int8.prepare, int8_int8.run),)


def choose_float(weight: LinearWeight, dtype: torch.dtype) -> tuple[Kernel, ...]:
    """Kernels for a floating-point input, ordered by max_rows; the last one takes any M."""
    chosen: list[Kernel] = []
    for kernel in FLOAT_INPUT:
        if kernel.supports(weight, dtype):
            chosen.append(kernel)
            if kernel.max_rows is None:
                break
    return tuple(chosen)


def choose_int8(weight: LinearWeight, dtype: torch.dtype) -> Kernel | None:
    """The kernel that takes int8 codes as input, or None where there is none for this weight."""
    return next((kernel for kernel in INT8_INPUT if kernel.supports(weight, dtype)), None)
