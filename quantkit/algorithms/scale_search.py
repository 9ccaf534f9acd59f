"""Scales that minimize the (weighted) squared error of round-to-nearest, tile by tile.

For each tile the candidates are the min-max scale times a ratio from a grid; each is rounded to its dtype on
disk before it is judged, because that is the scale the loader will use. A ratio below 1 clips the largest
weights and spends the grid on the others.
"""

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from quantkit.numerics import affine
from quantkit.schemes import FloatSpec, IntSpec, QParams, Spec
from quantkit.schemes.tiles import round_scale, to_tiles

# 0.5 to 1.1 of the min-max scale: 4-bit optima spread over 0.6–1.0; above 1 helps where -8 has room.
INT_RATIOS = tuple(round(0.50 + 0.02 * step, 2) for step in range(31))
FP8_RATIOS = tuple(
    round(0.75 + 0.0125 * step, 4) for step in range(41)
)  # rescales the mantissa grid; nothing clips
SLICE_ELEMENTS = 1 << 15  # small enough that torch runs each step on one thread, in its L2 cache


def search_qparams(
    w_NK: Tensor, spec: Spec, scale_dtype: torch.dtype, importance_K: Tensor | None = None
) -> QParams:
    """Scale (and zero point) of each tile with the least Σ importance · (w − ŵ)².

    w_NK: any float dtype. importance_K: float32 [K] ≥ 0, weight of each input channel's error (E[x²] of the
    channel makes the sum the expected squared error of the output); None: all alike.
    Returns QParams in the shape on disk, scale in scale_dtype.
    """
    num_rows, num_cols = w_NK.shape
    tiles = to_tiles(w_NK.float(), spec.granularity)
    importance = None
    if importance_K is not None:
        importance = to_tiles(importance_K.float().expand(num_rows, num_cols), spec.granularity)
    lead, size = tiles.shape[:-1], tiles.shape[-1]
    flat = tiles.reshape(-1, size)
    flat_importance = None if importance is None else importance.reshape(-1, size)
    scale = torch.empty(len(flat), 1, dtype=scale_dtype)
    zero_point = torch.empty(len(flat), 1, dtype=torch.int8)
    step = max(1, SLICE_ELEMENTS // size)

    def search(start: int) -> None:
        part = slice(start, start + step)
        weights = None if flat_importance is None else flat_importance[part].contiguous()
        scale[part], zero_point[part] = _search_slice(flat[part], spec, scale_dtype, weights)

    with ThreadPoolExecutor(
        torch.get_num_threads()
    ) as threads:  # slices are independent; torch drops the GIL
        list(threads.map(search, range(0, len(flat), step)))
    if spec.symmetric:
        return QParams(scale.view(lead))
    return QParams(scale.view(lead), zero_point.view(lead))


def _search_slice(
    tiles: Tensor, spec: Spec, scale_dtype: torch.dtype, importance: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Best scale in scale_dtype and zero point of tiles [n, size]; both [n, 1]."""
    low = tiles.amin(dim=-1, keepdim=True).clamp_(max=0)
    if isinstance(spec, IntSpec) and not spec.symmetric:
        base, _ = affine.choose_asymmetric(tiles, spec.qmin, spec.qmax)
    else:
        half_range = affine.E4M3_MAX if isinstance(spec, FloatSpec) else (spec.qmax - spec.qmin) / 2
        base = affine.choose_symmetric(tiles, half_range)
    buffer = torch.empty_like(tiles)
    best_error = torch.full_like(base, torch.inf)
    best_scale, best_zero = torch.empty_like(base), torch.zeros_like(base)
    for ratio in (1.0, *(FP8_RATIOS if isinstance(spec, FloatSpec) else INT_RATIOS)):  # ties go to min-max
        scale = round_scale(base * ratio, scale_dtype).float()
        zero_point = best_zero
        if isinstance(spec, IntSpec) and not spec.symmetric:
            zero_point = affine.choose_zero_point(low * ratio, scale, spec.qmin, spec.qmax)
        error = _error(tiles, spec, scale, zero_point, importance, buffer)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero_point, best_zero)
    return best_scale.to(scale_dtype), best_zero.to(torch.int8)


def _error(
    tiles: Tensor, spec: Spec, scale: Tensor, zero_point: Tensor, importance: Tensor | None, buffer: Tensor
) -> Tensor:
    """Σ importance · (ŵ − w)² of each tile, [n, 1]. Works in `buffer` to stay in the cache."""
    torch.mul(tiles, scale.reciprocal(), out=buffer)
    if isinstance(spec, FloatSpec):
        buffer.clamp_(-affine.E4M3_MAX, affine.E4M3_MAX)
        buffer.copy_(buffer.to(torch.float8_e4m3fn))
    else:
        # round(w/s + z) − z for an integer z: shift the bounds instead of the values
        buffer.round_()
        torch.clamp(buffer, min=spec.qmin - zero_point, max=spec.qmax - zero_point, out=buffer)
    buffer.mul_(scale).sub_(tiles).square_()
    if importance is not None:
        buffer.mul_(importance)
    return buffer.sum(dim=-1, keepdim=True)
