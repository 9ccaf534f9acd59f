"""Hadamard rotation of every 128 (or 64, 32, 16) features: x · H, H[i, j] = ±1 / √width, Sylvester's order.

    x [T, K] = [T · K / width, width]      a program: ROWS pieces after ROWS pieces, each tile one product with H

H is symmetric and its own inverse, so the same call undoes it. Its signs are the parity of i & j, made in registers:
nothing is read but x. 16-bit values times ±1 are exact and summed in float32 by tensor cores; float32 values are
multiplied as they are. Rounded once.

Bound: bytes. 2 read and 2 written per element; 256 operations of a tensor core are a quarter of that time.
Shape suffixes: T tokens, K features, R pieces, W the width of a piece.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantkit_kernels.capability import starts_early

WIDTHS = (16, 32, 64, 128)
ROWS, NUM_WARPS = 64, 4


@triton.jit
def signs(WIDTH: tl.constexpr, DTYPE: tl.constexpr):
    """[WIDTH, WIDTH] of ±1: −1 where i & j has an odd number of ones."""
    both = tl.arange(0, WIDTH)[:, None] & tl.arange(0, WIDTH)[None, :]
    both ^= both >> 4
    both ^= both >> 2
    both ^= both >> 1
    return (1 - 2 * (both & 1)).to(DTYPE)


@triton.jit
def hadamard_kernel(
    x, y, num_pieces, stride_x, PIECES_OF_A_ROW: tl.constexpr, WIDTH: tl.constexpr, SCALE: tl.constexpr,
    EARLY: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A program: ROWS pieces. y: contiguous."""
    h_WW = signs(WIDTH, x.dtype.element_ty)
    piece = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    is_there = (piece < num_pieces)[:, None]
    at = piece // PIECES_OF_A_ROW * stride_x + piece % PIECES_OF_A_ROW * WIDTH
    if EARLY:
        gdc_wait()
    x_RW = tl.load(x + at[:, None] + column[None, :], mask=is_there, other=0.0)
    if EARLY:
        gdc_launch_dependents()
    y_RW = tl.dot(x_RW, h_WW, input_precision="ieee") * SCALE
    tl.store(y + piece[:, None] * WIDTH + column[None, :], y_RW.to(x.dtype.element_ty), mask=is_there)


@torch.library.custom_op("quantkit::hadamard", mutates_args=(), device_types="cuda")
def hadamard(x_TK: Tensor, width: int) -> Tensor:
    """x with every `width` features rotated, contiguous [T, K] in the dtype of x (any float), features contiguous."""
    return launch(x_TK, width)


@hadamard.register_fake
def _(x_TK: Tensor, width: int) -> Tensor:
    return x_TK.new_empty(x_TK.shape)


@hadamard.register_kernel("cpu")
def rotate(x_TK: Tensor, width: int) -> Tensor:
    """`hadamard` in plain torch: log2(width) rounds of sums and differences in float32."""
    _check(x_TK, width)
    y = x_TK.float().reshape(-1, width)
    for _ in range(width.bit_length() - 1):  # each round combines the highest index bit and makes it the lowest
        low, high = y.chunk(2, dim=1)
        y = torch.stack((low + high, low - high), dim=2).flatten(1)
    return (y * width**-0.5).to(x_TK.dtype).view(x_TK.shape)


def launch(x_TK: Tensor, width: int, *, rows: int = ROWS, num_warps: int = NUM_WARPS) -> Tensor:
    """`hadamard` without the operator around it."""
    _check(x_TK, width)
    y_TK = x_TK.new_empty(x_TK.shape)
    num_pieces = x_TK.numel() // width
    early = starts_early(x_TK.device)
    if num_pieces > 0:
        hadamard_kernel[(triton.cdiv(num_pieces, rows),)](
            x_TK, y_TK, num_pieces, x_TK.stride(0), x_TK.shape[1] // width, width, width**-0.5, early, rows,
            num_warps=num_warps, launch_pdl=early,
        )  # fmt: skip
    return y_TK


def _check(x_TK: Tensor, width: int) -> None:
    assert width in WIDTHS, f"pieces of {width}, not of {WIDTHS}"
    assert x_TK.ndim == 2 and x_TK.stride(1) == 1 and x_TK.shape[1] % width == 0, (
        f"rows of pieces of {width}, not {x_TK.shape} by {x_TK.stride()}"
    )
