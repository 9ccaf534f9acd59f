"""The host's side of `csrc/wide.cuh`: how tiles of y are cut, dealt out and launched, for inputs of 16 and of 8 bits.

Shape suffixes: M rows, N out_features, K in_features.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit_kernels import nvrtc
from quantkit_kernels.capability import num_multiprocessors
from quantkit_kernels.repack import BLOCK_COLUMNS
from quantkit_kernels.strip_weight import KINDS, StripWeight
from quantkit_kernels.tensor_map import tensor_map

CAPABILITY = (9, 0)
ROW_BYTES = 128  # of x in a stage
SHARED_BYTES = 232448
MIN_STAGES, MAX_STAGES = 4, 12
PARAMS = {2: "128s128s5P12i40x", 1: "128s128s8P13i12x"}  # by bytes of an input
Y_COLUMNS = 64  # of a box: what a warpgroup has of a tile
M_GROUP = 8  # tiles of x for one of w, then the next of w


class Tiling(NamedTuple):
    """A tile of y: 64 warpgroups rows of w x m_tile rows of x."""

    m_tile: int = 256
    warpgroups: int = 2


class Kind(NamedTuple):
    """A tiling, and the clocks that an H100 takes for a stage of INT4 in a whole tile and in half of one."""

    tiling: Tiling
    whole: int
    half: int


def fastest(
    kinds: tuple[Kind, ...], num_rows: int, weight: StripWeight, x_size: int, multiprocessors: int
) -> Tiling:
    """By what its kind takes, of those whose ring has room for MIN_STAGES."""
    fitting = tuple(kind for kind in kinds if stages_of(weight, kind.tiling, x_size) >= MIN_STAGES)
    return _fastest(fitting, num_rows, weight.shape[0], multiprocessors)


@functools.cache
def _fastest(kinds: tuple[Kind, ...], num_rows: int, n: int, multiprocessors: int) -> Tiling:
    def clocks(kind: Kind) -> int:
        m_tiles, w_tiles = tiles_of(kind.tiling, num_rows, n)
        whole, halves = shares(m_tiles * w_tiles, kind.tiling, multiprocessors)
        return -(-whole // multiprocessors) * kind.whole + (halves > 0) * kind.half

    return min(kinds, key=clocks).tiling


def tiles_of(tiling: Tiling, num_rows: int, n: int) -> tuple[int, int]:
    """Along x and along w."""
    return -(-num_rows // tiling.m_tile), -(-n // (64 * tiling.warpgroups))


def shares(num_tiles: int, tiling: Tiling, multiprocessors: int) -> tuple[int, int]:
    """Whole tiles and halves: the tiles of a last round are halved if that gives no multiprocessor two of them."""
    rest = num_tiles % multiprocessors
    halved = rest if 2 * rest <= multiprocessors and tiling.warpgroups == 2 else 0
    return num_tiles - halved, 2 * halved


def stages_of(weight: StripWeight, tiling: Tiling, x_size: int) -> int:
    """Of the ring: as many as there is room for, and an even number."""
    room = SHARED_BYTES - _output_bytes(tiling)
    return min(MAX_STAGES, room // _stage_bytes(weight, tiling, x_size) // 2 * 2)


def shared_bytes_of(weight: StripWeight, tiling: Tiling, x_size: int) -> int:
    """The ring and the outputs."""
    return stages_of(weight, tiling, x_size) * _stage_bytes(weight, tiling, x_size) + _output_bytes(tiling)


def _stage_bytes(weight: StripWeight, tiling: Tiling, x_size: int) -> int:
    """Of 128 bytes of each row of x, w with its scales and zero points for as many columns, and the barriers."""
    of_w = 64 * tiling.warpgroups * weight.row_bytes(ROW_BYTES // x_size)
    return tiling.m_tile * ROW_BYTES + of_w + 8 * (1 + tiling.warpgroups)


def _output_bytes(tiling: Tiling) -> int:
    """A tile of y on its way out."""
    return 64 * tiling.warpgroups * tiling.m_tile * 2


def defines_of(weight: StripWeight, dtype: torch.dtype, tiling: Tiling, x_size: int) -> nvrtc.Defines:
    """What `csrc/wide.cuh` is specialised for. dtype: of y."""
    columns = ROW_BYTES // x_size
    assert weight.scale is not None
    is_known = not weight.group_size or columns % weight.group_size == 0 or weight.group_size % columns == 0
    assert is_known, f"groups of {weight.group_size}"
    return (
        ("X_SIZE", x_size),
        ("M_TILE", tiling.m_tile),
        ("WARPGROUPS", tiling.warpgroups),
        ("STAGES", stages_of(weight, tiling, x_size)),
        ("W_BITS", weight.bits),
        ("IS_E4M3", int(weight.stored.dtype == torch.float8_e4m3fn)),
        ("GROUP_ROWS", weight.group_rows(columns)),
        ("GROUP_STAGES", max(1, weight.group_size // columns)),
        ("ZERO", int(weight.zero_point is not None)),
        ("IS_BF16", int(dtype == torch.bfloat16)),
        ("SCALE_KIND", KINDS[weight.scale.dtype]),
    )


def launch(
    kernel: nvrtc.CudaKernel,
    x_MK: Tensor,
    y_MN: Tensor,
    weight: StripWeight,
    bias_N: Tensor | None,
    tiling: Tiling,
    *,
    more_tensors: tuple[Tensor | None, ...] = (),
    more_numbers: tuple[int, ...] = (),
    dependent: bool,
) -> None:
    """Write y. Rows of x start at multiples of 16 bytes. more_…: the last pointers and numbers of the struct."""
    (num_rows, n), k, x_size = y_MN.shape, x_MK.shape[1], x_MK.element_size()
    columns, multiprocessors = ROW_BYTES // x_size, num_multiprocessors(x_MK.device)
    m_tiles, w_tiles = tiles_of(tiling, num_rows, n)
    num_whole, num_halves = shares(m_tiles * w_tiles, tiling, multiprocessors)
    x_map = tensor_map(x_MK, tiling.m_tile, columns)
    y_map = tensor_map(y_MN, tiling.m_tile, Y_COLUMNS) if n % 8 == 0 else b""  # else threads store
    tensors = (y_MN, weight.stored, weight.scale, weight.zero_point, bias_N, *more_tensors)
    sizes = (num_rows, n, -(-weight.shape[1] // BLOCK_COLUMNS), weight.num_groups)
    tiles = (m_tiles, w_tiles, -(-k // columns), M_GROUP, num_whole, num_halves)
    row = (weight.stored.stride(0), weight.stored.shape[1]) if weight.bits == 8 else (0, 0)
    kernel.launch(
        (min(multiprocessors, max(num_whole, num_halves)),),
        128 * (tiling.warpgroups + 1),
        (x_map, y_map, *map(nvrtc.address, tensors), *sizes, *tiles, *row, *more_numbers),
        shared_bytes=shared_bytes_of(weight, tiling, x_size),
        dependent=dependent,
    )
