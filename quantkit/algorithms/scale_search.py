"""Scales that minimize the (weighted) error of round-to-nearest, tile by tile.

For each tile the candidates are the min-max scale times a ratio from a grid; each is rounded to its dtype on
disk before it is judged, because that is the scale the loader will use. A ratio below 1 clips the largest
weights and spends the grid on the others.

Without data the error is Σ |w − ŵ|^2.5: between the squared error, which clips too readily for the rare large weights,
and min-max, which never does. With the importance of each input channel it is Σ importance · |w − ŵ|², the error of
the output (as far as inputs are uncorrelated). Few-bit symmetric grids reach one step further down than up (−8 … 7),
so their candidates have either sign: a negative scale turns the long side to where the tile's largest weight
is. Loaders multiply by the scale and need no more.
"""

import torch
from torch import Tensor

from quantkit.algorithms.scale_search_gpu import search_on_gpu
from quantkit.numerics import affine
from quantkit.schemes import FloatSpec, IntSpec, QParams, Spec
from quantkit.schemes.tiles import round_scale, to_tiles

# Coarse steps of the ratio first, then finer ones around each tile's best. Few-bit grids gain from clipping;
# 8-bit ones from landing their largest weights on the grid. Without importance within 1 % of the loss of 71 even steps.
FEW_BIT_RATIOS, FEW_BIT_STEPS = (1.0, 0.92, 0.84, 0.76, 0.68, 0.60), (0.04, -0.04, 0.02, -0.02)
# With importance the best ratio can be anywhere: 17 candidates, 0.5 % below the loss of 61 even steps from 0.5 to 1.1.
WEIGHTED_RATIOS = tuple(round(1.1 - 0.05 * step, 2) for step in range(13))
WEIGHTED_STEPS = (0.025, -0.025, 0.0125, -0.0125)
EIGHT_BIT_RATIOS = (1.0, *(round(1.08 - 0.02 * step, 2) for step in range(13)))
EIGHT_BIT_STEPS = (0.01, -0.01, 0.005, -0.005)
SLICE_ELEMENTS = 1 << 19  # 2 MB of float32: stays in the caches, and is enough for each of 16 threads
GPU_SLICE_ELEMENTS = 1 << 25


def search_qparams(
    w_NK: Tensor, spec: Spec, scale_dtype: torch.dtype, importance_K: Tensor | None = None
) -> QParams:
    """Scale (and zero point) of each tile with the least Σ |w − ŵ|^2.5, or Σ importance · |w − ŵ|².

    w_NK: any float dtype. importance_K: float32 [K] ≥ 0, weight of each input channel's error (E[x²] of the
    channel is the natural choice); None: all alike.
    Returns QParams in the shape on disk, scale in scale_dtype.
    """
    if w_NK.is_cuda:
        ratios, steps = candidates(spec, has_importance=importance_K is not None)
        qparams = search_on_gpu(w_NK, spec, scale_dtype, importance_K, ratios, steps)
        if qparams is not None:
            return qparams
    num_rows, num_cols = w_NK.shape
    tiles = to_tiles(w_NK.float(), spec.granularity)
    importance = None
    if importance_K is not None:
        importance = to_tiles(importance_K.float().expand(num_rows, num_cols), spec.granularity)
    lead, size = tiles.shape[:-1], tiles.shape[-1]
    flat = tiles.reshape(-1, size)
    flat_importance = None if importance is None else importance.reshape(-1, size)
    scale = torch.empty(len(flat), 1, dtype=scale_dtype, device=flat.device)
    zero_point = torch.empty(len(flat), 1, dtype=torch.int8, device=flat.device)
    step = max(1, (GPU_SLICE_ELEMENTS if flat.is_cuda else SLICE_ELEMENTS) // size)

    for start in range(0, len(flat), step):
        part = slice(start, start + step)
        weights = None if flat_importance is None else flat_importance[part].contiguous()
        scale[part], zero_point[part] = _search_slice(flat[part], spec, scale_dtype, weights)
    if spec.symmetric:
        return QParams(scale.view(lead))
    return QParams(scale.view(lead), zero_point.view(lead))


def candidates(spec: Spec, *, has_importance: bool) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Ratios of the min-max scale that are all tried, then steps from the best one so far."""
    if spec.bits > 4:
        return EIGHT_BIT_RATIOS, EIGHT_BIT_STEPS
    return (WEIGHTED_RATIOS, WEIGHTED_STEPS) if has_importance else (FEW_BIT_RATIOS, FEW_BIT_STEPS)


class _Best:
    """The best candidate so far of each tile: error, ratio, scale and zero point, all [n, 1]."""

    def __init__(self, base: Tensor) -> None:
        self.error = torch.full_like(base, torch.inf)
        self.ratio, self.scale, self.zero_point = (torch.zeros_like(base) for _ in range(3))

    def offer(self, error: Tensor, ratio: Tensor, scale: Tensor, zero_point: Tensor) -> None:
        """Take the candidate where it is better; ties keep the earlier one."""
        is_better = error < self.error
        self.error = torch.where(is_better, error, self.error)
        self.ratio = torch.where(is_better, ratio, self.ratio)
        self.scale = torch.where(is_better, scale, self.scale)
        self.zero_point = torch.where(is_better, zero_point, self.zero_point)


def _search_slice(
    tiles: Tensor, spec: Spec, scale_dtype: torch.dtype, importance: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Best scale in scale_dtype and zero point of tiles [n, size]; both [n, 1]."""
    low = tiles.amin(dim=-1, keepdim=True).clamp_(max=0)
    base = _minmax_scale(tiles, spec)
    unit = (base / base.frexp().mantissa).abs()  # a power of two, so that dividing by it is exact
    tiles = tiles / unit  # errors in units of the scale: as they are, they leave float32 from 1e15 on
    best = _Best(base)
    buffers = torch.empty_like(tiles), torch.empty_like(tiles)

    def judge(ratio: Tensor) -> None:
        scale = round_scale(base * ratio, scale_dtype).float()
        zero_point = torch.zeros_like(scale)
        if isinstance(spec, IntSpec) and not spec.symmetric:
            zero_point = affine.choose_zero_point(low * ratio, scale, spec.qmin, spec.qmax)
        error = _error(tiles, spec, scale / unit, zero_point, importance, buffers)
        best.offer(error, ratio, scale, zero_point)

    ratios, steps = candidates(spec, has_importance=importance is not None)
    for ratio in ratios:
        judge(torch.full_like(base, ratio))
    for step in steps:
        judge(best.ratio + step)
    return best.scale.to(scale_dtype), best.zero_point.to(torch.int8)


def _minmax_scale(tiles: Tensor, spec: Spec) -> Tensor:
    """The scale that ratios multiply; negative where a few-bit symmetric grid reaches further that way."""
    if isinstance(spec, FloatSpec):
        return affine.choose_symmetric(tiles, affine.E4M3_MAX)
    if not spec.symmetric:
        return affine.choose_asymmetric(tiles, spec.qmin, spec.qmax)[0]
    scale = affine.choose_symmetric(tiles, (spec.qmax - spec.qmin) / 2)
    if spec.bits > 4:
        return scale  # one step of 255 is not worth a sign that readers do not expect
    largest_is_positive = tiles.amax(dim=-1, keepdim=True) > -tiles.amin(dim=-1, keepdim=True)
    return torch.where(largest_is_positive, -scale, scale)


def _error(
    tiles: Tensor,
    spec: Spec,
    scale: Tensor,
    zero_point: Tensor,
    importance: Tensor | None,
    buffers: tuple[Tensor, Tensor],
) -> Tensor:
    """Σ |w − ŵ|^2.5, or Σ importance · |w − ŵ|², of each tile, [n, 1]. Works in `buffers` to stay in the cache."""
    error, root = buffers
    torch.mul(tiles, scale.reciprocal(), out=error)
    if isinstance(spec, FloatSpec):
        error.clamp_(-affine.E4M3_MAX, affine.E4M3_MAX)
        error.copy_(error.to(torch.float8_e4m3fn))
    elif spec.symmetric:
        error.round_().clamp_(spec.qmin, spec.qmax)
    else:
        error.round_()  # round(w/s + z) − z for an integer z: the bounds are shifted instead of the values
        torch.clamp(error, min=spec.qmin - zero_point, max=spec.qmax - zero_point, out=error)
    torch.addcmul(tiles, error, scale, value=-1, out=error)
    if importance is None:
        importance = torch.abs(error, out=root).sqrt_()
    total: Tensor = torch.linalg.vecdot(error.square_(), importance)
    return total.unsqueeze(-1)
