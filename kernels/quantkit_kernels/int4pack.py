"""INT4 weight-only, in groups, bf16 activations, few rows: torch's `_weight_int4pack_mm_for_cpu`.

The operator computes (u − 8) · scale + zero with u = code + 8 and bf16 scale and zero, so a zero point z goes in
as zero = −z · scale. Its weight layout depends on the machine's vector width; it is made by the operator's own
converter and never read by us.

    packed   uint8 [N, K / 2], opaque           scale_zero   bf16 [K / g, N, 2]

Bound: half a byte per weight, so a quarter of the bf16 traffic at M = 1. The work grows with M, and from M ≈ 32
dequantizing first is faster. With float32 activations the operator is a slow reference: never used there.
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
    group_size: int
    num_rows: int


def supports(weight: LinearWeight, dtype: torch.dtype) -> bool:
    """INT4 in groups (or one group per row) that the operator has, scales and zeros exact in bf16."""
    fits = weight.bits == 4 and dtype == torch.bfloat16 and weight.tile[0] == 1
    if not fits or weight.tile[1] not in GROUP_SIZES or weight.codes_NK.shape[1] % weight.tile[1]:
        return False
    scale, zero = _scale_and_zero(weight)
    return _is_bf16(scale) and _is_bf16(zero)


def prepare(weight: LinearWeight, dtype: torch.dtype) -> Int4Packed:
    """Repack for the operator."""
    assert dtype == torch.bfloat16, "supports() refused it"
    num_rows = weight.codes_NK.shape[0]
    extra = -num_rows % ROW_MULTIPLE
    unsigned = pad(weight.codes_NK.to(torch.int32) + 8, (0, 0, 0, extra))
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned, 1)
    scale, zero = (pad(values, (0, 0, 0, extra)).T for values in _scale_and_zero(weight))
    scale_zero = torch.stack((scale, zero), dim=-1).to(torch.bfloat16).contiguous()
    return Int4Packed(packed, scale_zero, weight.tile[1], num_rows)


def run(x_MK: Tensor, weight: Int4Packed) -> Tensor:
    """x · wᵀ, [M, N], bf16."""
    y_MN: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
        x_MK.contiguous(), weight.packed, weight.group_size, weight.scale_zero
    )
    return y_MN[:, : weight.num_rows]


def _scale_and_zero(weight: LinearWeight) -> tuple[Tensor, Tensor]:
    scale = weight.scale_RG.float()
    if weight.zero_point_RG is None:
        return scale, torch.zeros_like(scale)
    return scale, -weight.zero_point_RG.float() * scale


def _is_bf16(values: Tensor) -> bool:
    return torch.equal(values.to(torch.bfloat16).float(), values)
