"""Products of few rows with a weight of any format: the host's side of `csrc/skinny.cu`, which draws the kernel.

Bound: the bytes of the weight. M ≤ 32; compute capability 9.0 or newer (bulk copies into shared memory).
Shape suffixes: M rows, N out_features, K in_features, G groups.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantkit_kernels import nvrtc
from quantkit_kernels.repack import BLOCK_COLUMNS, STRIP_ROWS
from quantkit_kernels.strip_weight import KINDS, StripWeight

MAX_ROWS = 32
MIN_CAPABILITY = (9, 0)
WARPS = 8
THREADS = 32 * (WARPS + 1)
PARAMS = "9P10i"


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
    start while the kernel in front still runs; the weight is read then, so that no kernel in front may write it.
    """
    num_rows, num_cols = x_MK.shape
    n, k = weight.shape
    out_dtype = out_dtype or x_MK.dtype
    assert 0 < num_rows <= MAX_ROWS and num_cols == k, f"x {tuple(x_MK.shape)} for a weight {weight.shape}"
    assert x_MK.stride(1) == 1, "columns of x have to be next to each other"
    assert out_dtype in (torch.bfloat16, torch.float16), f"no output in {out_dtype}"
    assert bias_N is None or bias_N.dtype == out_dtype, "bias and output have one dtype"
    y_MN = torch.empty(num_rows, n, dtype=out_dtype, device=x_MK.device)
    num_strips = -(-n // STRIP_ROWS)
    plan = _plan(_kind_of(x_MK, weight, out_dtype), num_strips, x_MK.get_device())
    args = (
        y_MN.data_ptr(),
        x_MK.data_ptr(),
        weight.stored.data_ptr(),
        nvrtc.address(weight.scale),
        nvrtc.address(weight.zero_point),
        nvrtc.address(bias_N),
        nvrtc.address(x_scale),
        nvrtc.address(x_zero_point),
        0 if x_zero_point is None else nvrtc.address(weight.row_sum),
        num_rows,
        n,
        k,
        x_MK.stride(0),
        n,
        0 if x_scale is None or x_scale.numel() == 1 else 1,
        weight.stored.stride(0) * weight.stored.element_size() if weight.bits > 4 else 0,
        num_strips,
        -(-k // BLOCK_COLUMNS),
        weight.num_groups,
    )
    plan.kernel.launch(plan.grid, THREADS, args, shared_bytes=plan.shared_bytes, dependent=dependent)
    return y_MN


class Kind(NamedTuple):
    """What a kernel is compiled for. scale_dtype: of groups; tiles: of 8 rows of x; is_vector: eight x are one load."""

    stored_dtype: torch.dtype
    scale_dtype: torch.dtype
    has_zero_point: bool
    bits: int
    group_size: int
    x_dtype: torch.dtype
    out_dtype: torch.dtype
    tiles: int
    is_vector: bool


class Plan(NamedTuple):
    """A kernel and how it is launched."""

    kernel: nvrtc.CudaKernel
    grid: tuple[int, ...]
    shared_bytes: int


class Shape(NamedTuple):
    """How a kernel goes over a weight: strips at a time, blocks of 64 columns in a stage, bytes of the ring.

    Measured on an H100. What the ring leaves of an SM's memory is L1, which x is read from many times; and the kernel
    behind can only be there early if both rings fit.
    """

    strips: int
    blocks: int
    ring_bytes: int


def _kind_of(x_MK: Tensor, weight: StripWeight, out_dtype: torch.dtype) -> Kind:
    num_rows, num_cols = x_MK.shape
    size = x_MK.element_size()
    in_groups = weight.group_size and weight.scale is not None
    return Kind(
        stored_dtype=weight.stored.dtype,
        scale_dtype=weight.scale.dtype if in_groups and weight.scale is not None else torch.float32,
        has_zero_point=weight.zero_point is not None,
        bits=weight.bits,
        group_size=weight.group_size,
        x_dtype=x_MK.dtype,
        out_dtype=out_dtype,
        tiles=1 if num_rows <= 8 else 2 if num_rows <= 16 else 4,
        is_vector=num_cols % 8 == 0 and x_MK.stride(0) * size % 16 == 0 and x_MK.data_ptr() % 16 == 0,
    )


@functools.cache
def _plan(kind: Kind, num_strips: int, device: int) -> Plan:
    properties: Any = torch.cuda.get_device_properties(device)  # Any: torch's stub does not have all of them
    num_sms = properties.multi_processor_count
    shape = _fitting(kind, properties.shared_memory_per_block_optin)
    if num_strips <= num_sms:
        shape = shape._replace(strips=1)
    shared_bytes, stages = _shared_bytes(kind, shape), _stages(kind, shape)[0]
    kernel = nvrtc.load("skinny.cu", "skinny", PARAMS, defines_of(kind, shape, stages))
    return Plan(kernel, (min(-(-num_strips // shape.strips), num_sms),), shared_bytes)


def _shape(kind: Kind) -> Shape:
    if kind.bits == 4:
        return Shape(2, 32 if kind.tiles < 4 else 16, 84 << 10)
    if kind.bits == 16:
        return Shape(2 if kind.tiles == 1 else 1, 16, 110 << 10)
    if kind.x_dtype.itemsize == 1 or kind.tiles == 1:
        return Shape(2, 32, 136 << 10)
    return Shape(1, 32, 68 << 10)


def _fitting(kind: Kind, max_bytes: int) -> Shape:
    """The shape, or where a block may not have so much shared memory (99 KB from 12.0 on) the next smaller one."""
    shape = _shape(kind)
    smaller = Shape(shape.strips, 16, 60 << 10)
    shapes = (shape, smaller, smaller._replace(strips=1))
    return next((each for each in shapes if _shared_bytes(kind, each) <= max_bytes), shapes[-1])


def _shared_bytes(kind: Kind, shape: Shape) -> int:
    """The ring, two barriers for each of its stages, and the sums."""
    stages, stage_bytes = _stages(kind, shape)
    return stages * (stage_bytes + 16) + _sum_bytes(shape, kind.tiles)


def _stages(kind: Kind, shape: Shape) -> tuple[int, int]:
    """Number of stages that the ring has, and their bytes."""
    columns = shape.blocks * BLOCK_COLUMNS
    row_pad = {4: 0, 8: 32, 16: 64}[kind.bits]
    codes = 16 * (columns * kind.bits // 8 + row_pad)
    groups = columns // kind.group_size if kind.group_size else 0
    scales = groups * 16 * (kind.scale_dtype.itemsize + kind.has_zero_point)
    stage = shape.strips * (-(-(codes + scales) // 128) * 128)
    return max(2, shape.ring_bytes // stage), stage


def _sum_bytes(shape: Shape, tiles: int) -> int:
    """Of the warps' sums: two buffers, as long as they are small."""
    parts = shape.strips * tiles
    return (1 if parts > 2 else 2) * WARPS * parts * 16 * 10 * 4


def defines_of(kind: Kind, shape: Shape, stages: int) -> nvrtc.Defines:
    """What `csrc/skinny.cu` is compiled with."""
    return (
        ("W_KIND", KINDS[kind.stored_dtype]),
        ("X_KIND", KINDS[kind.x_dtype]),
        ("Y_KIND", KINDS[kind.out_dtype]),
        ("SCALE_KIND", KINDS[kind.scale_dtype]),
        ("W_BITS", kind.bits),
        ("GROUP", kind.group_size),
        ("ZERO", int(kind.has_zero_point)),
        ("TILES", kind.tiles),
        ("STRIPS", shape.strips),
        ("WARPS", WARPS),
        ("BLOCKS", shape.blocks),
        ("STAGES", stages),
        ("VECTOR_X", int(kind.is_vector)),
    )
