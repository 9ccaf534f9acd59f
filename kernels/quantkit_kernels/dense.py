"""The dense product x · wᵀ + b on a CPU. Without bf16 units many rows are multiplied in float32 and rounded once.

A matmul in bf16 that the processor has no instructions for runs at a sixth of float32's speed (2 AVX2 cores,
4096 × 576 · 576 × 1536: 17 against 96 GFLOP/s). The result is the same but for the order of summation: bf16 matmuls sum
in float32 too. Few rows wait for the weight's bytes, of which float32 has twice as many.

Shape suffixes: M rows, N out_features, K in_features.
"""

import functools

import torch
from torch import Tensor
from torch.nn import functional

MIN_ROWS = 16
CHUNK_ELEMENTS = 1 << 20  # weights in float32 at a time: 4 MB


def linear(x_MK: Tensor, w_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """x · wᵀ + b, [M, N], in the dtype of x and w; any float dtype, M, N and K."""
    is_slow = x_MK.dtype == torch.bfloat16 and not x_MK.is_cuda and not has_bf16_units()
    if not is_slow or x_MK.shape[0] < MIN_ROWS:
        return functional.linear(x_MK, w_NK, bias_N)
    wide_MK = x_MK.float()
    y_MN = x_MK.new_empty(len(x_MK), len(w_NK))
    step = max(1, CHUNK_ELEMENTS // w_NK.shape[1])
    for start in range(0, len(w_NK), step):
        rows = slice(start, start + step)
        bias = None if bias_N is None else bias_N[rows].float()
        y_MN[:, rows] = functional.linear(wide_MK, w_NK[rows].float(), bias)
    return y_MN


@functools.cache
def has_bf16_units() -> bool:
    """Whether this CPU multiplies bf16 by itself."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
