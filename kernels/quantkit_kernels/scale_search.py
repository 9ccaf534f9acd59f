"""Scales of least rounding error, tile by tile.

    base      min-max scale of the tile, with a sign where the grid is longer on one side
    candidate round_to_dtype(base · ratio): first the ratios of a list, then steps up and down from the best so far
    error     Σ |w − ŵ|^2.5, or Σ importance · |w − ŵ|²

Tiles are a weight's groups, rows or blocks, one after another in memory; the importance of tile t is row t mod P of
its own array, which is P = 1 for rows and the number of groups or blocks across for the others. On a CPU the caller
searches in torch.

Shape suffixes: T tiles, S elements of a tile, P periods of the importance.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from quantkit_kernels.operators import operator

Grid = Literal["symmetric", "either sign", "asymmetric", "e4m3"]
GRIDS: tuple[Grid, ...] = ("symmetric", "either sign", "asymmetric", "e4m3")
MAX_SIZE = 1 << 15  # elements of a tile: 64 registers of each of 512 threads


class Candidates(NamedTuple):
    """Ratios of the min-max scale that are all tried, then steps from the best one so far, each tried in turn."""

    ratios: tuple[float, ...]
    steps: tuple[float, ...]


def supports(size: int) -> bool:
    """Whether a tile of so many elements fits the registers of a program."""
    return size <= MAX_SIZE


def _fake(
    tiles_TS: Tensor,
    importance_PS: Tensor | None,
    ratios: list[float],
    steps: list[float],
    grid: str,
    qmin: int,
    qmax: int,
    scale_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    num_tiles = tiles_TS.shape[0]
    return tiles_TS.new_empty(num_tiles, dtype=scale_dtype), tiles_TS.new_empty(num_tiles, dtype=torch.int8)


@operator("scale_search", cpu=None, fake=_fake)
def scale_search(
    tiles_TS: Tensor,
    importance_PS: Tensor | None,
    ratios: list[float],
    steps: list[float],
    grid: str,
    qmin: int,
    qmax: int,
    scale_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Scale [T] in scale_dtype and zero point, int8 [T] (zeros unless the grid is asymmetric), of each tile.

    tiles_TS: any float dtype, finite. importance_PS: float32 ≥ 0, tile t takes row t mod P; with it errors are squared,
    without it to the power 2.5. grid: "symmetric" (min-max scale amax / ((qmax − qmin) / 2)), "either sign" (the same,
    negative where the largest weight is positive), "asymmetric", or "e4m3", which ignores qmin and qmax.
    """
    from quantkit_kernels import scale_search_kernel

    return scale_search_kernel.launch(
        tiles_TS, importance_PS, Candidates(tuple(ratios), tuple(steps)), grid, qmin, qmax, scale_dtype
    )
