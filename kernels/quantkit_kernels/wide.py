"""Products of hundreds to thousands of rows with weights of 4 or 8 bits: the host's side of `csrc/wide.cu`.

Weights become 16 bits, rounded once after their scale, as a dequantized one would be; a scale of a group is rounded to
the dtype of x before that, where it is not exact in it (float32 in bf16: by 2^-9).

Bound: the tensor cores. Compute capability 9.0 alone (`wgmma`).
Shape suffixes: M rows, N out_features, K in_features.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from quantkit_kernels import nvrtc
from quantkit_kernels.capability import num_multiprocessors
from quantkit_kernels.strip_weight import StripWeight
from quantkit_kernels.wide_launch import PARAMS, Kind, Tiling, defines_of, fastest, launch

X_SIZE = 2
KINDS = (Kind(Tiling(256), 1065, 615), Kind(Tiling(128), 720, 420), Kind(Tiling(128, 3), 1020, 0))


def wide(
    x_MK: Tensor,
    weight: StripWeight,
    *,
    bias_N: Tensor | None = None,
    dependent: bool = False,
    tiling: Tiling | None = None,
) -> Tensor:
    """x · wᵀ (+ bias), [M, N], in the dtype of x: bf16 or fp16. Any M, N and K.

    dependent: start while the kernel in front still runs; it may not write the weight, which is read early in any case.
    tiling: instead of the fastest.
    """
    (num_rows, num_cols), (n, k) = x_MK.shape, weight.shape
    assert num_cols == k, f"x {tuple(x_MK.shape)} for a weight {weight.shape}"
    assert weight.bits in (4, 8), f"weights of {weight.bits} bits"
    assert x_MK.dtype in (torch.bfloat16, torch.float16), f"no input in {x_MK.dtype}"
    assert x_MK.stride(1) == 1, "columns of x have to be next to each other"
    assert bias_N is None or bias_N.dtype == x_MK.dtype, "bias and output have one dtype"
    y_MN = x_MK.new_empty(num_rows, n)
    if num_rows == 0:
        return y_MN
    if x_MK.stride(0) % 8 or x_MK.data_ptr() % 16:
        x_MK = pad(x_MK, (0, -k % 8))[:, :k]
    tiling = tiling or fastest(KINDS, num_rows, weight, X_SIZE, num_multiprocessors(x_MK.device))
    kernel = nvrtc.load("wide.cu", "wide", PARAMS[X_SIZE], defines_of(weight, x_MK.dtype, tiling, X_SIZE))
    launch(kernel, x_MK, y_MN, weight, bias_N, tiling, dependent=dependent)
    return y_MN
