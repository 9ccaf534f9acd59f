"""Products of many rows with a weight of 4 or 8 bits: some rows of it at a time in 16 bits, multiplied by cuBLAS.

A slice stays in the L2 cache between the kernel that writes it (`csrc/dequantize.cu`) and the product that reads it.
For every GPU, and for more rows of x than a fused kernel is faster with.

Bound: the tensor cores, plus writing and reading 2 bytes per weight in L2.
Shape suffixes: M rows, N out_features, K in_features.
"""

import torch
from torch import Tensor

from quantkit_kernels import nvrtc
from quantkit_kernels.repack import BLOCK_COLUMNS
from quantkit_kernels.strip_weight import KINDS, StripWeight

SLICE_BYTES = 36 << 20  # of 50 MB: at 2048 rows and 14336 columns a tenth faster than 24
ROW_STEP = 256  # rows of a slice: a multiple, so that cuBLAS has whole tiles
MAX_GRID_ROWS = 65535
PARAMS = "4P5i"
THREADS = 256


def sliced(x_MK: Tensor, weight: StripWeight, *, bias_N: Tensor | None = None) -> Tensor:
    """x · wᵀ (+ bias), [M, N], in the dtype of x: bf16 or fp16. Any M, N and K."""
    (n, k), num_rows = weight.shape, x_MK.shape[0]
    assert x_MK.shape[1] == k, f"x {tuple(x_MK.shape)} for a weight {weight.shape}"
    assert x_MK.dtype in (torch.bfloat16, torch.float16), f"no input in {x_MK.dtype}"
    y_MN = torch.empty(num_rows, n, dtype=x_MK.dtype, device=x_MK.device)
    step = rows_of_slice(k)
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


def rows_of_slice(k: int) -> int:
    """As many as fit into the cache and a grid, in whole tiles."""
    return min(max(1, SLICE_BYTES // (2 * k) // ROW_STEP), MAX_GRID_ROWS // ROW_STEP) * ROW_STEP


def dequantize_rows(weight: StripWeight, first_row: int, out_NK: Tensor) -> None:
    """Write rows of the weight, from `first_row`, in the dtype of `out_NK` [rows, K padded to 64]; contiguous."""
    assert weight.scale is not None and weight.bits in (4, 8), f"weights of {weight.bits} bits"
    rows, columns = out_NK.shape
    assert out_NK.is_contiguous() and columns == -(-weight.shape[1] // BLOCK_COLUMNS) * BLOCK_COLUMNS
    defines = (
        ("W_BITS", weight.bits),
        ("IS_E4M3", int(weight.stored.dtype == torch.float8_e4m3fn)),
        ("GROUP", weight.group_size),
        ("ZERO", int(weight.zero_point is not None)),
        ("OUT_KIND", KINDS[out_NK.dtype]),
        ("SCALE_KIND", KINDS[weight.scale.dtype]),
    )
    kernel = nvrtc.load("dequantize.cu", "dequantize", PARAMS, defines)
    tensors = (out_NK, weight.stored, weight.scale, weight.zero_point)
    pointers = [nvrtc.address(tensor) for tensor in tensors]
    row = [weight.stored.stride(0), weight.stored.shape[1]] if weight.bits == 8 else [0, columns]
    args = (*pointers, first_row, columns // BLOCK_COLUMNS, weight.num_groups, *row)
    kernel.launch((-(-columns // (8 * THREADS)), rows), THREADS, args)
