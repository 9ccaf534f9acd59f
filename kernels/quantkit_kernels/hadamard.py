"""Hadamard rotation of every 128 (or 64, 32, 16) features: x · H, H[i, j] = ±1 / √width, Sylvester's order.

    x [T, K]   | width | width | …      the sign is the parity of i & j, so H is symmetric and its own inverse:
               · H       · H            the same call undoes it

Summed in float32, rounded once.
Shape suffixes: T tokens, K features, R pieces, W the width of a piece.
"""

import torch
from torch import Tensor

from quantkit_kernels.operands import FLOATS
from quantkit_kernels.operators import operator

WIDTHS = (16, 32, 64, 128)


def rotate(x_TK: Tensor, width: int) -> Tensor:
    """`hadamard` in plain torch: log2(width) rounds of sums and differences in float32."""
    check(x_TK, width)
    y_RW = x_TK.float().reshape(-1, width)
    for _ in range(width.bit_length() - 1):  # combine the highest bit of the index and make it the lowest
        low, high = y_RW.chunk(2, dim=1)
        y_RW = torch.stack((low + high, low - high), dim=2).flatten(1)
    y_RW *= width**-0.5
    return y_RW.to(x_TK.dtype).view(x_TK.shape)


def check(x_TK: Tensor, width: int) -> None:
    """What `hadamard` says about its operands."""
    assert width in WIDTHS, f"pieces of {width}, not of {WIDTHS}"
    assert x_TK.dtype in FLOATS, f"x of {x_TK.dtype}"
    assert x_TK.ndim == 2 and x_TK.stride(1) == 1 and x_TK.shape[1] % width == 0, (
        f"rows of pieces of {width}, not {x_TK.shape} by {x_TK.stride()}"
    )


def _fake(x_TK: Tensor, width: int) -> Tensor:
    return x_TK.new_empty(x_TK.shape)


@operator("hadamard", cpu=rotate, fake=_fake)
def hadamard(x_TK: Tensor, width: int) -> Tensor:
    """x with every `width` features rotated, contiguous [T, K]. x_TK: bf16, fp16 or fp32, features contiguous."""
    from quantkit_kernels import hadamard_kernel

    return hadamard_kernel.launch(x_TK, width)
