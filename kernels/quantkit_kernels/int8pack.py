"""INT8 weight-only, one scale per row, bf16 activations, few rows: torch's `_weight_int8pack_mm`.

    codes   int8 [N, K] as they are           scale   bf16 [N]

The operator reads K in steps of 16 and, without looking, past the end of a row that is no multiple of them.
Bound: one byte per weight, half of the bf16 traffic at M = 1; from M ≈ 32 dequantizing first is faster.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from quantkit_kernels.weight import LinearWeight

COL_MULTIPLE = 16


class Int8Rows(NamedTuple):
    """The operator's operands."""

    codes_NK: Tensor
    scale_N: Tensor


def supports(weight: LinearWeight, dtype: torch.dtype) -> bool:
    """INT8, symmetric, one scale per row that is exact in bf16, K a multiple of 16."""
    is_int8 = weight.bits == 8 and weight.codes_NK.dtype == torch.int8 and weight.zero_point_RG is None
    if (
        not is_int8
        or dtype != torch.bfloat16
        or not weight.is_per_row
        or weight.codes_NK.shape[1] % COL_MULTIPLE
    ):
        return False
    return torch.equal(weight.scale_RG.to(dtype).float(), weight.scale_RG.float())


def prepare(weight: LinearWeight, dtype: torch.dtype) -> Int8Rows:
    """Keep the codes, one scale for every row."""
    num_rows = weight.codes_NK.shape[0]
    return Int8Rows(
        weight.codes_NK.contiguous(), weight.scale_RG.to(dtype).expand(num_rows, 1)[:, 0].contiguous()
    )


def run(x_MK: Tensor, weight: Int8Rows) -> Tensor:
    """x · wᵀ, [M, N], bf16."""
    if x_MK.shape[0] == 0:  # contiguous whatever its strides, which the operator refuses
        return x_MK.new_empty(0, weight.codes_NK.shape[0])
    return torch._weight_int8pack_mm(x_MK.contiguous(), weight.codes_NK, weight.scale_N)
