"""`hadamard` on a GPU: each tile of ROWS pieces is one product with H.

The signs of H are made in registers: nothing is read but x. 16-bit values times ±1 are exact and summed in float32 by
tensor cores; float32 values are split in two TF32 numbers, which keep 22 bits.

Bound: bytes. 2 read and 2 written per element; 256 operations of a tensor core are a quarter of that time.
Shape suffixes: T tokens, K features, R pieces, W the width of a piece.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantkit_kernels.capability import starts_early
from quantkit_kernels.hadamard import check
from quantkit_kernels.triton_launch import Launcher, num_parts

SHAPES = {
    2: (64, 4),
    4: (16, 8),
}  # bytes of an element: rows and warps of a program; float32 needs registers for two H


@triton.jit
def signs(WIDTH: tl.constexpr, DTYPE: tl.constexpr):
    """[WIDTH, WIDTH] of ±1: −1 where i & j has an odd number of ones."""
    both = tl.arange(0, WIDTH)[:, None] & tl.arange(0, WIDTH)[None, :]
    both ^= both >> 4
    both ^= both >> 2
    both ^= both >> 1
    return (1 - 2 * (both & 1)).to(DTYPE)


@triton.jit(do_not_specialize=["num_pieces"])  # one kernel for every batch
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
    y_RW = tl.dot(x_RW, h_WW, input_precision="tf32x3") * SCALE
    tl.store(y + piece[:, None] * WIDTH + column[None, :], y_RW.to(x.dtype.element_ty), mask=is_there)


_hadamard = Launcher(hadamard_kernel)


def launch(x_TK: Tensor, width: int) -> Tensor:
    """`hadamard` without the operator around it."""
    check(x_TK, width)
    rows, num_warps = SHAPES[x_TK.itemsize]
    y_TK = x_TK.new_empty(x_TK.shape)
    num_pieces = x_TK.numel() // width
    early = starts_early(x_TK.device)
    if num_pieces > 0:
        _hadamard(
            (num_parts(num_pieces, rows), 1),
            (x_TK, y_TK, num_pieces, x_TK.stride(0)),
            (x_TK.shape[1] // width, width, width**-0.5, early, rows),
            num_warps=num_warps,
            early=early,
        )
    return y_TK
