"""How the kernels in CUDA C++ read a weight of any format: by strips of 16 rows.

    INT4            fragments, int32 [N / 16, K / 64, 32, 4]     docs/kernels.md draws them
    8 and 16 bits   rows as they are on disk, [N, K]
    scales          in groups: [N / 16, G, 16], one strip's scales of a group side by side; else float32 [N]

Shape suffixes: N out_features, K in_features, G groups.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from quantkit_kernels.operands import GROUPS
from quantkit_kernels.repack import from_fragments, from_strips, to_fragments, to_strips
from quantkit_kernels.weight import LinearWeight

KINDS = {  # as `csrc/common.cuh` has them
    torch.int8: 0,
    torch.int32: 0,
    torch.float8_e4m3fn: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.float32: 4,
}
SCALE_LIMIT = 256  # of scales in 16 bits: so much below the largest number `tile` has powers of two in


class StripWeight(NamedTuple):
    """A weight as the kernel reads it.

    stored: fragments (INT4), or rows [N, K'] of codes or 16-bit values. scale: [N / 16, G, 16] in groups, float32 [N]
    per row, None for a 16-bit weight. zero_point: int8 like scale. row_sum: float32 [N], of the dequantized rows, for
    inputs with a zero point.
    """

    stored: Tensor
    scale: Tensor | None
    zero_point: Tensor | None
    row_sum: Tensor | None
    shape: tuple[int, int]
    bits: int
    group_size: int  # 0: one scale per row

    @property
    def num_groups(self) -> int:
        """Groups of a row; 0 where the row has one scale, or none."""
        return self.scale.shape[1] if self.group_size and self.scale is not None else 0

    def group_rows(self, columns: int) -> int:
        """Rows of scales that so many columns come with; 0: one scale for a whole row of the weight."""
        return max(1, columns // self.group_size) if self.group_size else 0

    def row_bytes(self, columns: int) -> int:
        """Of a row's codes, scales of groups and zero points over so many columns."""
        of_codes, groups = columns * self.bits // 8, self.group_rows(columns)
        if not groups or self.scale is None:
            return of_codes
        return of_codes + groups * (self.scale.element_size() + (self.zero_point is not None))


def exact_dtype(scale: Tensor) -> torch.dtype:
    """The smallest dtype that has these scales exactly; float32 from SCALE_LIMIT on."""
    if bool((scale.abs() < SCALE_LIMIT).all()):
        for dtype in (torch.bfloat16, torch.float16):
            if torch.equal(scale.to(dtype).float(), scale.float()):
                return dtype
    return torch.float32


def prepare(weight: LinearWeight, *, with_row_sum: bool = False) -> StripWeight:
    """Lay a quantized weight out. Codes of 8 bits stay where they are, unless rows are no multiple of 16 bytes."""
    num_rows, num_cols = weight.codes_NK.shape
    is_integer = weight.codes_NK.dtype == torch.int8
    assert weight.zero_point_RG is None or is_integer, f"codes in {weight.codes_NK.dtype} have no zero points"
    row_sum = None
    if with_row_sum:
        assert weight.zero_point_RG is None, "no scheme has zero points on both sides"
        row_sum = _row_sums(weight)
    bits = weight.stored_bits
    stored = to_fragments(weight.codes_NK) if bits == 4 else aligned_rows(weight.codes_NK)
    scale, zero_point, group = weight.scale_RG, weight.zero_point_RG, weight.tile[1]
    if group >= num_cols:
        if zero_point is None:
            per_row = scale[torch.arange(num_rows, device=scale.device) // weight.tile[0], 0].float()
            return StripWeight(stored, per_row, None, row_sum, (num_rows, num_cols), bits, 0)
        # zero points are subtracted by group: repeat what is one for the row
        group, times = GROUPS[-1], -(-num_cols // GROUPS[-1])
        scale, zero_point = scale.repeat(1, times), zero_point.repeat(1, times)
    scale = to_strips(scale.to(exact_dtype(scale)), weight.tile, num_rows)
    if zero_point is not None:
        zero_point = to_strips(zero_point, weight.tile, num_rows)
    return StripWeight(stored, scale, zero_point, row_sum, (num_rows, num_cols), bits, group)


def prepare_dense(weight_NK: Tensor) -> StripWeight:
    """A weight in 16 bits."""
    num_rows, num_cols = weight_NK.shape
    return StripWeight(aligned_rows(weight_NK), None, None, None, (num_rows, num_cols), 16, 0)


def _row_sums(weight: LinearWeight) -> Tensor:
    rows, cols = weight.tile
    num_rows, num_cols = weight.codes_NK.shape
    per_group = pad(weight.codes_NK.float(), (0, -num_cols % cols)).view(num_rows, -1, cols).sum(dim=-1)
    of_row = torch.arange(num_rows, device=per_group.device) // rows
    return (per_group * weight.scale_RG.float()[of_row]).sum(dim=1)


def aligned_rows(values_NK: Tensor) -> Tensor:
    """Values whose rows start at multiples of 16 bytes; padded with zeros if they have to move."""
    per_16_bytes = 16 // values_NK.element_size()
    extra = -values_NK.shape[1] % per_16_bytes
    is_aligned = values_NK.stride(0) % per_16_bytes == 0 and values_NK.data_ptr() % 16 == 0
    if extra == 0 and values_NK.stride(1) == 1 and is_aligned:
        return values_NK
    raw = values_NK.view(torch.int8) if values_NK.element_size() == 1 else values_NK
    return pad(raw, (0, extra)).view(values_NK.dtype).contiguous()


def dense(weight: StripWeight, dtype: torch.dtype) -> Tensor:
    """The weight's values, [N, K], rounded once to `dtype`. The arithmetic is float32."""
    num_rows, num_cols = weight.shape
    if weight.bits == 4:
        values = from_fragments(weight.stored, num_rows, num_cols).float()
    else:
        values = weight.stored[:, :num_cols].float()
    if weight.scale is None:
        return values.to(dtype)
    if not weight.group_size:
        return (values * weight.scale[:, None]).to(dtype)
    group = torch.arange(num_cols, device=values.device) // weight.group_size
    if weight.zero_point is not None:
        values = values - from_strips(weight.zero_point, num_rows)[:, group].float()
    return (values * from_strips(weight.scale, num_rows)[:, group].float()).to(dtype)
