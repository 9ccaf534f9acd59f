"""Products of few rows with a weight of any format: the host's side of `csrc/skinny.cu`, which draws the kernel.

Bound: the bytes of the weight. M ≤ 32; compute capability 9.0 or newer (bulk copies into shared memory).
Shape suffixes: M rows, N out_features, K in_features, G groups.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from quantkit_kernels import nvrtc
from quantkit_kernels.repack import BLOCK_COLUMNS, STRIP_ROWS, to_fragments, to_strips
from quantkit_kernels.weight import LinearWeight

MAX_ROWS = 32
MIN_CAPABILITY = (9, 0)
WARPS = 8
GROUPS = (32, 64, 128)
PARAMS = "9P10i"
KINDS = {
    torch.int8: 0,
    torch.int32: 0,
    torch.float8_e4m3fn: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.float32: 4,
}


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


def exact_dtype(scale: Tensor) -> torch.dtype:
    """The smallest dtype that has these scales exactly."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(scale.to(dtype).float(), scale.float()):
            return dtype
    return torch.float32


def prepare(weight: LinearWeight, *, with_row_sum: bool = False) -> StripWeight:
    """Lay a quantized weight out. Codes of 8 bits stay where they are, unless rows are no multiple of 16 bytes."""
    num_rows, num_cols = weight.codes_NK.shape
    row_sum = None
    if with_row_sum:
        assert weight.zero_point_RG is None, "no scheme has zero points on both sides"
        row_sum = _row_sums(weight)
    stored = to_fragments(weight.codes_NK) if weight.bits == 4 else _aligned_rows(weight.codes_NK)
    scale, zero_point, group = weight.scale_RG, weight.zero_point_RG, weight.tile[1]
    if group >= num_cols:
        if zero_point is None:
            per_row = scale[torch.arange(num_rows, device=scale.device) // weight.tile[0], 0].float()
            return StripWeight(stored, per_row, None, row_sum, (num_rows, num_cols), weight.bits, 0)
        # zero points are subtracted by group: repeat what is one for the row
        group, times = GROUPS[-1], -(-num_cols // GROUPS[-1])
        scale, zero_point = scale.repeat(1, times), zero_point.repeat(1, times)
    scale = to_strips(scale.to(exact_dtype(scale)), weight.tile, num_rows)
    if zero_point is not None:
        zero_point = to_strips(zero_point, weight.tile, num_rows)
    return StripWeight(stored, scale, zero_point, row_sum, (num_rows, num_cols), weight.bits, group)


def prepare_dense(weight_NK: Tensor) -> StripWeight:
    """A weight in 16 bits."""
    num_rows, num_cols = weight_NK.shape
    return StripWeight(_aligned_rows(weight_NK), None, None, None, (num_rows, num_cols), 16, 0)


def _row_sums(weight: LinearWeight) -> Tensor:
    rows, cols = weight.tile
    num_rows, num_cols = weight.codes_NK.shape
    per_group = pad(weight.codes_NK.float(), (0, -num_cols % cols)).view(num_rows, -1, cols).sum(dim=-1)
    of_row = torch.arange(num_rows, device=per_group.device) // rows
    return (per_group * weight.scale_RG.float()[of_row]).sum(dim=1)


def _aligned_rows(values_NK: Tensor) -> Tensor:
    per_16_bytes = 16 // values_NK.element_size()
    extra = -values_NK.shape[1] % per_16_bytes
    if extra == 0 and values_NK.stride(1) == 1 and values_NK.stride(0) % per_16_bytes == 0:
        return values_NK
    raw = values_NK.view(torch.int8) if values_NK.element_size() == 1 else values_NK
    return pad(raw, (0, extra)).view(values_NK.dtype).contiguous()


def skinny(
    x_MK: Tensor,
    weight: StripWeight,
    *,
    out_dtype: torch.dtype | None = None,
    x_scale: Tensor | None = None,
    x_zero_point: Tensor | None = None,
    bias_N: Tensor | None = None,
    dependent: bool = False,
) -> Tensor:
    """x · wᵀ (+ bias), [M, N] in `out_dtype`; M ≤ 32.

    x_MK: bf16 or fp16, or codes (int8, float8_e4m3fn) with x_scale and x_zero_point, float32 [M] or [1]. dependent:
    start while the kernel in front still runs.
    """
    num_rows, num_cols = x_MK.shape
    n, k = weight.shape
    out_dtype = out_dtype or x_MK.dtype
    assert 0 < num_rows <= MAX_ROWS and num_cols == k, f"x {tuple(x_MK.shape)} for a weight {weight.shape}"
    assert x_MK.stride(1) == 1, "columns of x have to be next to each other"
    assert out_dtype in (torch.bfloat16, torch.float16), f"no output in {out_dtype}"
    assert bias_N is None or bias_N.dtype == out_dtype, "bias and output have one dtype"
    y_MN = torch.empty(num_rows, n, dtype=out_dtype, device=x_MK.device)
    num_sms = torch.cuda.get_device_properties(x_MK.device).multi_processor_count
    shape = _shape(weight, x_MK.dtype, num_rows, num_sms)
    stages, stage_bytes = _stages(weight, shape)
    kernel = nvrtc.load("skinny.cu", "skinny", PARAMS, _defines(x_MK, weight, out_dtype, shape, stages))
    num_strips = -(-n // STRIP_ROWS)
    num_groups = weight.scale.shape[1] if weight.group_size and weight.scale is not None else 0
    step = 0 if x_scale is None or x_scale.numel() == 1 else 1
    pointers: tuple[Tensor | None, ...] = (y_MN, x_MK, weight.stored, weight.scale, weight.zero_point, bias_N)
    pointers += (x_scale, x_zero_point, None if x_zero_point is None else weight.row_sum)
    numbers: tuple[int, ...] = (num_rows, n, k, x_MK.stride(0), y_MN.stride(0), step)
    numbers += (weight.stored.stride(0) * weight.stored.element_size() if weight.bits > 4 else 0,)
    numbers += (num_strips, -(-k // BLOCK_COLUMNS), num_groups)
    grid = min(-(-num_strips // shape.strips), num_sms)
    shared = stages * (stage_bytes + 16) + _sum_bytes(shape, num_rows)
    args = tuple(0 if tensor is None else tensor.data_ptr() for tensor in pointers) + numbers
    kernel.launch((grid,), 32 * (WARPS + 1), args, shared_bytes=shared, dependent=dependent)
    return y_MN


def _tiles(num_rows: int) -> int:
    return 1 if num_rows <= 8 else 2 if num_rows <= 16 else 4


class Shape(NamedTuple):
    """How a kernel goes over a weight: strips at a time, blocks of 64 columns in a stage, bytes of the ring.

    Measured on an H100; more than 113 KB of ring, and the kernel behind cannot be there while this one runs.
    """

    strips: int
    blocks: int
    ring_bytes: int


def _shape(weight: StripWeight, x_dtype: torch.dtype, num_rows: int, num_sms: int) -> Shape:
    tiles = _tiles(num_rows)
    if weight.bits == 8:
        shape = Shape(2, 32, 136 << 10) if tiles > 1 and x_dtype.itemsize == 1 else Shape(1, 32, 102 << 10)
    elif weight.bits == 4:
        shape = Shape(2, 32 if tiles < 4 else 16, 84 << 10)
    else:
        shape = Shape(2 if tiles == 1 else 1, 16, 110 << 10)
    return shape._replace(strips=1) if -(-weight.shape[0] // STRIP_ROWS) <= num_sms else shape


def _stages(weight: StripWeight, shape: Shape) -> tuple[int, int]:
    """Number of stages that the ring has, and their bytes."""
    columns = shape.blocks * BLOCK_COLUMNS
    row_pad = {4: 0, 8: 32, 16: 64}[weight.bits]
    codes = 16 * (columns * weight.bits // 8 + row_pad)
    groups = columns // weight.group_size if weight.group_size else 0
    per_group = 0 if weight.scale is None else weight.scale.element_size() + (weight.zero_point is not None)
    stage = shape.strips * (-(-(codes + groups * 16 * per_group) // 128) * 128)
    return max(2, shape.ring_bytes // stage), stage


def _sum_bytes(shape: Shape, num_rows: int) -> int:
    """Of the warps' sums: two buffers, as long as they are small."""
    parts = shape.strips * _tiles(num_rows)
    return (1 if parts > 2 else 2) * WARPS * parts * 16 * 10 * 4


def _defines(
    x_MK: Tensor, weight: StripWeight, out_dtype: torch.dtype, shape: Shape, stages: int
) -> nvrtc.Defines:
    is_vector = (
        x_MK.data_ptr() % 16 == 0
        and x_MK.stride(0) * x_MK.element_size() % 16 == 0
        and x_MK.shape[1] % 8 == 0
    )
    scale_dtype = weight.scale.dtype if weight.scale is not None and weight.group_size else torch.float32
    return (
        ("W_KIND", KINDS[weight.stored.dtype]),
        ("X_KIND", KINDS[x_MK.dtype]),
        ("Y_KIND", KINDS[out_dtype]),
        ("SCALE_KIND", KINDS[scale_dtype]),
        ("W_BITS", weight.bits),
        ("GROUP", weight.group_size),
        ("ZERO", int(weight.zero_point is not None)),
        ("TILES", _tiles(x_MK.shape[0])),
        ("STRIPS", shape.strips),
        ("WARPS", WARPS),
        ("BLOCKS", shape.blocks),
        ("STAGES", stages),
        ("VECTOR_X", int(is_vector)),
    )
