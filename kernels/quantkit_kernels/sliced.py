"""Products of many rows with a weight of 4 or 8 bits: some rows of it at a time in 16 bits, multiplied by cuBLAS.

A slice stays in the L2 cache between the kernel that writes it (`csrc/dequantize.cu`) and the product that reads it.
For every GPU, and for more rows of x than a fused kernel is faster with.

Bound: the tensor cores, plus writing and reading 2 bytes per weight in L2.
Shape suffixes: M rows, N out_features, K in_features.
"""

import functools

import torch
from torch import Tensor

from quantkit_kernels import nvrtc
from quantkit_kernels.capability import num_multiprocessors
from quantkit_kernels.repack import BLOCK_COLUMNS, STRIP_ROWS
from quantkit_kernels.strip_weight import KINDS, StripWeight

SLICE_BYTES = 36 << 20  # of 50 MB: at 2048 rows and 14336 columns a tenth faster than 24
TILE_ROWS, TILE_COLUMNS = 256, 128  # of y: what cuBLAS multiplies at a time, or as much in another shape
PARAMS = "4P6i"
THREADS = 1024


def sliced(x_MK: Tensor, weight: StripWeight, *, bias_N: Tensor | None = None) -> Tensor:
    """x · wᵀ (+ bias), [M, N], in the dtype of x: bf16 or fp16. Any M, N and K."""
    (n, k), num_rows = weight.shape, x_MK.shape[0]
    assert x_MK.shape[1] == k, f"x {tuple(x_MK.shape)} for a weight {weight.shape}"
    assert x_MK.dtype in (torch.bfloat16, torch.float16), f"no input in {x_MK.dtype}"
    y_MN = torch.empty(num_rows, n, dtype=x_MK.dtype, device=x_MK.device)
    step = rows_of_slice(num_rows, n, k, num_multiprocessors(x_MK.device))
    columns = -(-k // BLOCK_COLUMNS) * BLOCK_COLUMNS
    slice_NK = torch.empty(min(step, n), columns, dtype=x_MK.dtype, device=x_MK.device)
    for start in range(0, n, step):
        rows = min(step, n - start)
        dequantize_rows(weight, start, slice_NK[:rows])
        w_KN, out = slice_NK[:rows, :k].T, y_MN[:, start : start + rows]
        if bias_N is None:
            torch.mm(x_MK, w_KN, out=out)
        else:
            torch.addmm(bias_N[start : start + rows], x_MK, w_KN, out=out)
    return y_MN


@functools.cache
def rows_of_slice(num_rows: int, n: int, k: int, multiprocessors: int) -> int:
    """Of those that fit into the cache: the fewest rounds of tiles on all multiprocessors, then slices, then rows."""
    most = max(1, SLICE_BYTES // (2 * k) // TILE_COLUMNS)

    def rounds_and_slices(tiles: int) -> tuple[int, int, int]:
        per_column, whole = -(-num_rows // TILE_ROWS), -(-n // TILE_COLUMNS)
        widths = [min(tiles, whole - start) for start in range(0, whole, tiles)]
        return sum(-(-width * per_column // multiprocessors) for width in widths), len(widths), tiles

    return TILE_COLUMNS * min(range(1, most + 1), key=rounds_and_slices)


def dequantize_rows(weight: StripWeight, first_row: int, out_NK: Tensor) -> None:
    """Write rows of the weight, from `first_row`, in the dtype of `out_NK` [rows, K padded to 64]; contiguous.

    first_row: a multiple of 16.
    """
    assert weight.scale is not None and weight.bits in (4, 8), f"weights of {weight.bits} bits"
    rows, columns = out_NK.shape
    assert out_NK.is_contiguous() and columns == -(-weight.shape[1] // BLOCK_COLUMNS) * BLOCK_COLUMNS
    assert first_row % STRIP_ROWS == 0 and first_row + rows <= weight.shape[0], f"rows {first_row} + {rows}"
    defines = (
        ("W_BITS", weight.bits),
        ("IS_E4M3", int(weight.stored.dtype == torch.float8_e4m3fn)),
        ("GROUP", weight.group_size),
        ("ZERO", int(weight.zero_point is not None)),
        ("IS_BF16", int(out_NK.dtype == torch.bfloat16)),
        ("SCALE_KIND", KINDS[weight.scale.dtype]),
    )
    kernel = nvrtc.load("dequantize.cu", "dequantize", PARAMS, defines)
    tensors = (out_NK, weight.stored, weight.scale, weight.zero_point)
    pointers = [nvrtc.address(tensor) for tensor in tensors]
    row = [weight.stored.stride(0), weight.stored.shape[1]] if weight.bits == 8 else [0, columns]
    args = (*pointers, first_row // STRIP_ROWS, rows, columns // BLOCK_COLUMNS, weight.num_groups, *row)
    strips = -(-rows // STRIP_ROWS)
    kernel.launch((min(strips, 2 * num_multiprocessors(out_NK.device)),), THREADS, args)
