"""Products of 8-bit weights with few rows of x: the host's side of `csrc/byte_stream.cu`, which draws the kernel.

Bound: the bytes of the weight. M ≤ 64; compute capability 9.0 alone (`wgmma`).
Shape suffixes: M rows, N out_features, K in_features.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit_kernels import nvrtc
from quantkit_kernels.capability import num_multiprocessors
from quantkit_kernels.strip_weight import KINDS
from quantkit_kernels.tensor_map import map_of, tensor_map

CAPABILITY = (9, 0)
MAX_ROWS = 64
BOX_COLUMNS = 128
MAX_TILE_ROWS = 256  # of a tensor map's box
SPLIT_ROWS = 48  # of a tile: up to so many, warps that make 16 bits of w share out columns too
SHARED_BYTES = 227 << 10  # of a block
PARAMS = "128s128s6P4i"


class Kind(NamedTuple):
    """What the kernel is compiled for. inputs: codes like w's, or 16 bits. m_tile: rows of x that are multiplied."""

    codes: torch.dtype
    inputs: torch.dtype
    out_dtype: torch.dtype
    in_blocks: bool
    m_tile: int

    @property
    def is_wide(self) -> bool:
        """Whether w has to become 16 bits."""
        return self.inputs.itemsize == 2


class Shape(NamedTuple):
    """How a product is cut.

    rows: of w in a tile. k_groups: of warps that share its columns. x_boxes, boxes: of 128 columns in a slot of x, and
    of w. w_stages, x_stages: slots of the rings. split: blocks that share a tile's columns, a cluster.
    """

    rows: int
    k_groups: int
    x_boxes: int
    boxes: int
    w_stages: int
    x_stages: int
    split: int = 1


class Plan(NamedTuple):
    """A kernel and how it is launched."""

    kernel: nvrtc.CudaKernel
    shape: Shape
    threads: int
    shared_bytes: int


def stream(
    x_MK: Tensor,
    w_codes_NK: Tensor,
    w_scale: Tensor,
    *,
    num_outputs: int,
    out_dtype: torch.dtype,
    x_scale: Tensor | None = None,
    bias_N: Tensor | None = None,
    zero_point: Tensor | None = None,
    code_sum_N: Tensor | None = None,
    shape: Shape | None = None,
) -> Tensor:
    """x · wᵀ (+ bias), [M, N] in out_dtype; M ≤ 64. It starts while the kernel in front still runs.

    w_codes_NK: int8 or float8_e4m3fn; x_MK: the same, with x_scale, or bf16 or fp16, without. Rows start at multiples
    of 16 bytes. x_scale, w_scale: float32 [M] or [1], and [N]; or of 128 columns, [M, ceil(K / 128)], and of blocks of
    128 × 128. zero_point: int8 like x_scale, with code_sum_N, the int32 sums of w's rows. shape: instead of `shape_of`.
    """
    num_rows, num_cols = x_MK.shape
    assert 0 < num_rows <= MAX_ROWS, f"{num_rows} rows, of at most {MAX_ROWS}"
    assert x_MK.stride(1) == w_codes_NK.stride(1) == 1, "columns have to be next to each other"
    y_MN = torch.empty(num_rows, num_outputs, dtype=out_dtype, device=x_MK.device)
    kind = Kind(w_codes_NK.dtype, x_MK.dtype, out_dtype, w_scale.ndim == 2, m_tile_of(num_rows))
    assert (x_scale is None) == kind.is_wide, f"x in {x_MK.dtype} with scales {x_scale}"
    assert not (kind.is_wide and kind.in_blocks), "blocks of scales are for codes of x"
    multiprocessors = num_multiprocessors(x_MK.device)
    plan = _plan(kind, shape or shape_of(kind, num_outputs, multiprocessors), x_MK.get_device())
    x_scale = None if x_scale is None else x_scale.contiguous()
    size = x_MK.element_size()
    bias_N = None if bias_N is None else bias_N.to(out_dtype)
    args = (
        tensor_map(w_codes_NK, plan.shape.rows, BOX_COLUMNS),
        map_of(
            x_MK.data_ptr(),
            num_rows,
            num_cols * size,
            x_MK.stride()[0] * size,
            torch.int8,
            kind.m_tile,
            BOX_COLUMNS,
        ),
        y_MN.data_ptr(),
        w_scale.data_ptr(),
        nvrtc.address(x_scale),
        nvrtc.address(zero_point),
        nvrtc.address(code_sum_N),
        nvrtc.address(bias_N),
        num_rows,
        num_outputs,
        -(-num_cols // BOX_COLUMNS),
        0 if x_scale is None or x_scale.numel() == 1 else 1,
    )
    split, tiles = plan.shape.split, -(-num_outputs // plan.shape.rows)
    blocks = min(tiles, multiprocessors // split) * split
    plan.kernel.launch(
        (blocks,), plan.threads, args, shared_bytes=plan.shared_bytes, cluster=split, dependent=True
    )
    return y_MN


def m_tile_of(num_rows: int) -> int:
    """Rows of x that a tensor core multiplies."""
    return next(tile for tile in (8, 16, 32, 64) if num_rows <= tile)


IN_PAIRS = {  # by rows of w that a block has else, and rows of x: 16 bits, as measured on an H100
    (32, 32): Shape(64, 2, 4, 4, 0, 3, split=2),
    (32, 64): Shape(64, 2, 2, 2, 0, 4, split=2),
    (48, 64): Shape(96, 2, 2, 2, 0, 3, split=2),
}


@functools.cache
def _plan(kind: Kind, shape: Shape, device: int) -> Plan:
    kernel = nvrtc.load("byte_stream.cu", "byte_stream", PARAMS, defines_of(kind, shape))
    return Plan(kernel, shape, threads_of(kind, shape), shared_bytes_of(kind, shape))


@functools.cache
def shape_of(kind: Kind, n: int, multiprocessors: int) -> Shape:
    """As many rows of w on each multiprocessor, in one tile or several; slots as measured on an H100."""
    passes = -(-n // (MAX_TILE_ROWS // 2 * multiprocessors))
    rows = -(-n // (multiprocessors * passes * 16)) * 16
    if kind.is_wide:
        return _wide_shape(kind, rows)
    if rows > 64:
        return with_stages(kind, Shape(rows, 1, 2, 2, 0, 3))
    x_boxes, x_stages = {8: (8, 3), 16: (8, 3), 32: (4, 4), 64: (4, 3)}[kind.m_tile]
    wide = with_stages(kind, Shape(rows, 2, x_boxes, 8, 0, x_stages))
    return wide if wide.w_stages > 2 else with_stages(kind, Shape(rows, 2, 4, 4, 0, 3))


def _wide_shape(kind: Kind, rows: int) -> Shape:
    """Where w becomes 16 bits. Of w there are three slots, or there is one less of x.

    With few rows of w and many of x two blocks share the columns of twice the rows: each reads half of x.
    """
    if (rows, kind.m_tile) in IN_PAIRS:
        return with_stages(kind, IN_PAIRS[rows, kind.m_tile])
    k_groups = 1 if rows == SPLIT_ROWS else 2
    if rows > SPLIT_ROWS:
        x_boxes, boxes, x_stages = (4, 4, 3 if rows < 112 else 2) if kind.m_tile < 32 else (2, 2, 3)
    else:
        x_boxes, boxes, x_stages = {8: (8, 8, 3), 16: (8, 8, 3), 32: (4, 4, 3), 64: (2, 4, 4)}[kind.m_tile]
    shape = with_stages(kind, Shape(rows, k_groups, x_boxes, boxes, 0, x_stages))
    return shape if shape.w_stages > 2 else with_stages(kind, shape._replace(x_stages=x_stages - 1))


def with_stages(kind: Kind, shape: Shape) -> Shape:
    """As many slots of w as there is room for."""
    free = SHARED_BYTES - shared_bytes_of(kind, shape._replace(w_stages=0))
    return shape._replace(w_stages=free // (shape.rows * BOX_COLUMNS * shape.boxes + 16))


def _row_groups(shape: Shape) -> int:
    """Groups of 64 rows that a tile has."""
    return -(-shape.rows // 64)


def team_of(kind: Kind, shape: Shape) -> tuple[int, int]:
    """Warpgroups that share columns, and the half boxes that they have at a time, each with sums of its own."""
    if not kind.is_wide or shape.rows > SPLIT_ROWS:
        return _row_groups(shape), 1
    return (3, 4) if shape.rows == SPLIT_ROWS else (1, 2)


def threads_of(kind: Kind, shape: Shape) -> int:
    """Those that multiply, and two warps that copy."""
    return 128 * team_of(kind, shape)[0] * shape.k_groups + 64


def shared_bytes_of(kind: Kind, shape: Shape) -> int:
    """Rings, sums of groups and clusters, barriers, facts of x's rows; what a last box's missing rows are read from."""
    w_slot = shape.rows * BOX_COLUMNS * shape.boxes
    x_slot = kind.m_tile * BOX_COLUMNS * shape.x_boxes * kind.inputs.itemsize
    parts = shape.k_groups * team_of(kind, shape)[1]
    scales = 4 * shape.x_boxes * kind.m_tile if kind.in_blocks else 0
    rings = shape.w_stages * (w_slot + 16) + shape.x_stages * (x_slot + 16 + scales)
    sums = (parts - 1) * shape.rows * kind.m_tile * 4
    inbox = 2 * (shape.split - 1) * shape.rows * kind.m_tile * 4 // shape.split + 16
    missing = (64 * _row_groups(shape) - shape.rows) * BOX_COLUMNS
    return max(rings + sums + inbox + 8 * kind.m_tile, shape.w_stages * w_slot + missing)


def defines_of(kind: Kind, shape: Shape) -> nvrtc.Defines:
    """What `csrc/byte_stream.cu` is specialised for."""
    return (
        ("IS_INT8", int(kind.codes == torch.int8)),
        ("IN_BLOCKS", int(kind.in_blocks)),
        ("X_KIND", KINDS[kind.inputs]),
        ("Y_KIND", KINDS[kind.out_dtype]),
        ("M_TILE", kind.m_tile),
        ("TILE_ROWS", shape.rows),
        ("K_GROUPS", shape.k_groups),
        ("X_BOXES", shape.x_boxes),
        ("BOXES", shape.boxes),
        ("W_STAGES", shape.w_stages),
        ("X_STAGES", shape.x_stages),
        ("SPLIT", shape.split),
    )
