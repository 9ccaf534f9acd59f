"""INT4 weight-only, in groups, bf16 activations, few rows: torch's `_weight_int4pack_mm_for_cpu`.

The operator computes (u − 8) · scale + zero with u = code + 8 and bf16 scale and zero. A zero point z goes in as
zero = −z · scale, which need not be a bf16 number; what rounding took from it is added by a second, small product:

    y = operator(x)  +  (Σ of x over each group) · residualᵀ           residual = −z · scale − bf16(−z · scale)

The operator's weight layout depends on the machine's vector width; it is made by the operator's own converter and
never read by us.

    packed   uint8 [N, K / 2], opaque     scale_zero   bf16 [K / g, N, 2]     residual   bf16 [G, N], or None

Bound: half a byte per weight, so a quarter of the bf16 traffic at M = 1. The work grows with M, and from M ≈ 32
dequantizing first is faster. With float32 activations the operator is a slow reference: never used there.
Shape suffixes: M rows, N out_features, K in_features, G groups.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from quantkit_kernels.weight import LinearWeight

GROUP_SIZES = (32, 64, 128, 256)
ROW_MULTIPLE = 16


class Int4Packed(NamedTuple):
    """The operator's operands; rows are padded to a multiple of 16."""

    packed: Tensor
    scale_zero: Tensor
    residual_GN: Tensor | None
    group_size: int
    num_rows: int


def supports(weight: LinearWeight, dtype: torch.dtype) -> bool:
    """INT4 in groups (or one group per row) that the operator has, scales exact in bf16."""
    rows, cols = weight.tile
    fits = weight.bits == 4 and rows == 1 and cols in GROUP_SIZES and weight.codes_NK.shape[1] % cols == 0
    scale = weight.scale_RG.float()
    return fits and dtype == torch.bfloat16 and torch.equal(scale.to(dtype).float(), scale)


def prepare(weight: LinearWeight, dtype: torch.dtype) -> Int4Packed:
    """Repack for the operator."""
    assert dtype == torch.bfloat16, "supports() refused it"
    num_rows = weight.codes_NK.shape[0]
    extra = -num_rows % ROW_MULTIPLE
    unsigned = pad(weight.codes_NK + 8, (0, 0, 0, extra)).to(torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned, 1)
    scale_GN = pad(weight.scale_RG.float(), (0, 0, 0, extra)).T
    zero_GN, residual_GN = torch.zeros_like(scale_GN), None
    if weight.zero_point_RG is not None:
        zero_GN = -pad(weight.zero_point_RG.float(), (0, 0, 0, extra)).T * scale_GN
        residual_GN = (zero_GN - zero_GN.to(dtype).float()).to(dtype)  # at most 4 significant bits: exact
    scale_zero = torch.stack((scale_GN, zero_GN), dim=-1).to(dtype).contiguous()
    return Int4Packed(packed, scale_zero, residual_GN, weight.tile[1], num_rows)


def run(x_MK: Tensor, weight: Int4Packed) -> Tensor:
    """x · wᵀ, [M, N], bf16."""
    y_MN: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
        x_MK.contiguous(), weight.packed, weight.group_size, weight.scale_zero
    )
    if weight.residual_GN is not None:
        num_rows, num_cols = x_MK.shape
        sums_MG = x_MK.reshape(num_rows, num_cols // weight.group_size, weight.group_size).sum(dim=-1)
        y_MN = y_MN + sums_MG @ weight.residual_GN
    return y_MN[:, : weight.num_rows]
