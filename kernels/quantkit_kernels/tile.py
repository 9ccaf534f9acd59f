"""Products of tens to hundreds of rows with weights of 4 or 8 bits: the host's side of `csrc/tile.cu`, which draws it.

x is first put into the order that the tensor cores read (`csrc/tile_x.cu`), rows rounded up to the tile; the product
starts loading weights meanwhile. Weights become 16 bits, rounded once after their scale, as a dequantized one would be:
in the dtype of x where scales of groups are in it, else in float32, which takes two instructions more for a weight.

Bound: the bytes of the weight up to about 70 rows of x, then the tensor cores. Compute capability 9.0 alone (`wgmma`).
Shape suffixes: M rows, N out_features, K in_features, G groups.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit_kernels import nvrtc
from quantkit_kernels.capability import num_multiprocessors
from quantkit_kernels.repack import BLOCK_COLUMNS
from quantkit_kernels.strip_weight import KINDS as DTYPES
from quantkit_kernels.strip_weight import StripWeight

CAPABILITY = (9, 0)
WARPGROUPS, THREADS = 2, 3 * 128
STAGE_COLUMNS = 128
SHARED_BYTES = {1: 232448, 2: 115712}  # of a block, by blocks on a multiprocessor
MIN_W_STAGES, MAX_W_STAGES = 2, 8
MAX_SPLIT, MIN_STAGES = 6, 4  # blocks that share K, and what each is to have of it
PARAMS, X_PARAMS = "6P7i", "2P3i"


class Tiling(NamedTuple):
    """How the product is cut.

    m_tile: rows of x in a tile. halves: 128 rows of w each. split: blocks that share K, a cluster. resident: blocks
    that fit on a multiprocessor. x_stages: of the ring.
    """

    m_tile: int
    halves: int
    split: int
    resident: int = 1
    x_stages: int = 3


class Kind(NamedTuple):
    """A kind of tiling, and what it takes on an H100: microseconds for a stage of INT4, and besides."""

    m_tile: int
    halves: int
    resident: int
    x_stages: int
    stage_us: float
    fixed_us: float


KINDS = (
    Kind(32, 1, 2, 5, 0.40, 2.5),
    Kind(64, 1, 2, 4, 0.50, 2.5),
    Kind(96, 1, 2, 2, 0.65, 2.5),
    Kind(128, 1, 1, 4, 0.76, 2.8),
    Kind(128, 2, 1, 4, 1.50, 3.5),
    Kind(192, 1, 1, 3, 1.05, 3.0),
    Kind(256, 1, 1, 3, 1.38, 3.0),
)
ONE_TILE = 128  # so many rows of x, and no more, are always in one tile
FIXED_ROWS = (
    64  # of a tile that any number of rows is cut into: few rows wait for the weight's bytes all the same
)
SPLIT_US = 0.6 / 64  # for each more block that shares K, and row of the tile


def tiling_of(num_rows: int, weight: StripWeight, multiprocessors: int) -> Tiling:
    """The fastest by what its kind takes, of those whose ring of w has room for MIN_W_STAGES."""
    return _fastest(num_rows, *weight.shape, weight.row_bytes(STAGE_COLUMNS), multiprocessors)


def fixed_tiling(weight: StripWeight, multiprocessors: int) -> Tiling:
    """One for any number of rows of x: then each element of y is the same sum, in the same order."""
    return tiling_of(FIXED_ROWS, weight, multiprocessors)


@functools.cache
def _fastest(num_rows: int, n: int, k: int, row_bytes: int, multiprocessors: int) -> Tiling:
    """Rows of x in one tile if they fit, else in tiles of 128 or more."""
    fitting = [kind for kind in KINDS if _w_stages(kind, row_bytes) >= MIN_W_STAGES]
    smallest = min((kind.m_tile for kind in fitting if num_rows <= kind.m_tile <= ONE_TILE), default=0)
    kinds = [
        kind for kind in fitting if kind.m_tile == smallest or (not smallest and kind.m_tile >= ONE_TILE)
    ]
    return min(_best_split(kind, num_rows, n, k, multiprocessors) for kind in kinds)[1]


def _best_split(kind: Kind, num_rows: int, n: int, k: int, multiprocessors: int) -> tuple[float, Tiling]:
    """The number of blocks that are best to share K, and the time it takes."""
    tiles, stages = -(-num_rows // kind.m_tile) * -(-n // (128 * kind.halves)), -(-k // STAGE_COLUMNS)
    slots = multiprocessors * kind.resident
    found = []
    for split in range(1, MAX_SPLIT + 1):
        # clusters of three and more do not find as many free neighbours as there are multiprocessors
        waves = -(-tiles * split // (slots if split <= 2 else slots * 3 // 4))
        if split == 1 or (waves == 1 and stages >= split * MIN_STAGES):
            once = -(-stages // split) * kind.stage_us + kind.fixed_us + SPLIT_US * kind.m_tile * (split - 1)
            found.append(
                (waves * once, Tiling(kind.m_tile, kind.halves, split, kind.resident, kind.x_stages))
            )
    return min(found)


def tile(
    x_MK: Tensor,
    weight: StripWeight,
    *,
    bias_N: Tensor | None = None,
    dependent: bool = False,
    tiling: Tiling | None = None,
) -> Tensor:
    """x · wᵀ (+ bias), [M, N], in the dtype of x: bf16 or fp16. Any M, N and K.

    dependent: start while the kernel in front still runs; it may not write the weight, which is read early in any case.
    tiling: instead of `tiling_of`.
    """
    num_rows, num_cols = x_MK.shape
    n, k = weight.shape
    assert num_cols == k, f"x {tuple(x_MK.shape)} for a weight {weight.shape}"
    assert weight.bits in (4, 8), f"weights of {weight.bits} bits"
    assert x_MK.dtype in (torch.bfloat16, torch.float16), f"no input in {x_MK.dtype}"
    assert x_MK.stride(1) == 1, "columns of x have to be next to each other"
    assert bias_N is None or bias_N.dtype == x_MK.dtype, "bias and output have one dtype"
    if num_rows == 0:
        return x_MK.new_empty(0, n)
    tiling = tiling or tiling_of(num_rows, weight, num_multiprocessors(x_MK.device))
    ordered = order(x_MK, tiling.m_tile, dependent=dependent)
    return multiply(ordered, num_rows, weight, tiling, bias_N=bias_N)


def order(x_MK: Tensor, m_tile: int, *, dependent: bool = False) -> Tensor:
    """x in the order of `csrc/tile_x.cu`, flat."""
    num_rows, k = x_MK.shape
    num_tiles, num_blocks = -(-num_rows // m_tile), -(-k // STAGE_COLUMNS) * 2
    out = torch.empty(num_tiles * num_blocks * m_tile * BLOCK_COLUMNS, dtype=x_MK.dtype, device=x_MK.device)
    is_paired = k % 2 == 0 and x_MK.stride(0) % 2 == 0 and x_MK.data_ptr() % 4 == 0
    kernel = nvrtc.load("tile_x.cu", "tile_x", X_PARAMS, (("M_TILE", m_tile), ("PAIRS", int(is_paired))))
    args = (out.data_ptr(), x_MK.data_ptr(), num_rows, k, x_MK.stride(0))
    kernel.launch((num_tiles * m_tile // 32, num_blocks), 256, args, dependent=dependent)
    return out


def multiply(
    ordered: Tensor, num_rows: int, weight: StripWeight, tiling: Tiling, *, bias_N: Tensor | None = None
) -> Tensor:
    """The product with what `order` made of x; starts while that is still being made."""
    n, k = weight.shape
    y_MN = torch.empty(num_rows, n, dtype=ordered.dtype, device=ordered.device)
    kernel = nvrtc.load("tile.cu", "tile", PARAMS, defines_of(weight, ordered.dtype, tiling))
    num_m_tiles = -(-num_rows // tiling.m_tile)
    num_tiles = num_m_tiles * -(-n // (64 * WARPGROUPS * tiling.halves))
    tensors = (y_MN, ordered, weight.stored, weight.scale, weight.zero_point, bias_N)
    pointers = [nvrtc.address(tensor) for tensor in tensors]
    row = [weight.stored.stride(0), weight.stored.shape[1]] if weight.bits == 8 else [0, 0]
    args = (*pointers, num_rows, n, -(-k // BLOCK_COLUMNS), weight.num_groups, num_m_tiles, *row)
    shared_bytes = shared_bytes_of(weight, tiling)
    kernel.launch(
        (num_tiles * tiling.split,),
        THREADS,
        args,
        shared_bytes=shared_bytes,
        cluster=tiling.split,
        dependent=True,
    )
    return y_MN


def _x_bytes(tiling: Tiling | Kind) -> int:
    """Of x in a stage."""
    return tiling.m_tile * STAGE_COLUMNS * 2


def _w_bytes(tiling: Tiling | Kind, row_bytes: int) -> int:
    """Of w in a stage, with its scales and zero points. row_bytes: of one row."""
    return 64 * WARPGROUPS * tiling.halves * row_bytes


def _w_stages(tiling: Tiling | Kind, row_bytes: int) -> int:
    """As many as there is room for beside the stages of x, which comes from L2."""
    room = SHARED_BYTES[tiling.resident] - tiling.x_stages * (_x_bytes(tiling) + 16) - 16
    return min(MAX_W_STAGES, room // _w_bytes(tiling, row_bytes))


def shared_bytes_of(weight: StripWeight, tiling: Tiling) -> int:
    """The rings or, after them, the sums; then the barriers."""
    row_bytes = weight.row_bytes(STAGE_COLUMNS)
    ring_of_w = _w_stages(tiling, row_bytes) * _w_bytes(tiling, row_bytes)
    sums = tiling.m_tile * (64 * WARPGROUPS * tiling.halves + 4) * 4
    return max(tiling.x_stages * _x_bytes(tiling) + ring_of_w, sums) // 8 * 8 + 8 + tiling.x_stages * 16


def defines_of(weight: StripWeight, dtype: torch.dtype, tiling: Tiling) -> nvrtc.Defines:
    """What `csrc/tile.cu` is specialised for."""
    assert weight.scale is not None
    is_known = weight.group_size in (0, 32, 64) or weight.group_size % STAGE_COLUMNS == 0
    assert is_known, f"groups of {weight.group_size}"
    w_stages = _w_stages(tiling, weight.row_bytes(STAGE_COLUMNS))
    assert w_stages >= MIN_W_STAGES, f"{tiling} takes too much shared memory"
    return (
        ("X_SIZE", 2),
        ("M_TILE", tiling.m_tile),
        ("WARPGROUPS", WARPGROUPS),
        ("HALVES", tiling.halves),
        ("RESIDENT", tiling.resident),
        ("X_STAGES", tiling.x_stages),
        ("W_STAGES", w_stages),
        ("W_BITS", weight.bits),
        ("IS_E4M3", int(weight.stored.dtype == torch.float8_e4m3fn)),
        ("GROUP_ROWS", weight.group_rows(STAGE_COLUMNS)),
        ("GROUP_STAGES", max(1, weight.group_size // STAGE_COLUMNS)),
        ("ZERO", int(weight.zero_point is not None)),
        ("IS_BF16", int(dtype == torch.bfloat16)),
        ("SCALE_KIND", DTYPES[weight.scale.dtype]),
    )
