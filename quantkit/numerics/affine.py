"""The one formula: w ≈ (code − zero_point) · scale, in float32.

Everything here works on *tiles*: a tensor whose last dimension holds the elements that share one scale, with
scale and zero point of the same shape but a last dimension of 1 (`schemes.tiles` makes such views of a
weight). Kernels, formats and the runtime are all tested against these functions.

Integer grids are signed, [qmin, qmax] = [−2^(b−1), 2^(b−1)−1]; FP8 is e4m3 with largest value 448. Numbers
are converted as compressed-tensors does: symmetric scale amax / ((qmax − qmin) / 2), range always includes 0,
rounding half to even.
"""

import torch
from torch import Tensor

E4M3_MAX = 448.0
TINY = torch.finfo(torch.float32).eps  # stands in for the scale of an all-zero tile


def choose_symmetric(tiles: Tensor, half_range: float) -> Tensor:
    """Min-max scale: amax over the last dimension / half_range, float32 [..., 1], always > 0.

    half_range: (qmax − qmin) / 2 for integers (7.5, 127.5), 448 for e4m3.
    """
    scale = tiles.float().abs().amax(dim=-1, keepdim=True) / half_range
    return torch.where(scale == 0, TINY, scale)  # NaN stays NaN, so that nobody writes it unnoticed


def choose_asymmetric(tiles: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    """Min-max scale and integer zero point of the range that spans the tile and 0.

    Returns (scale float32 > 0, zero_point float32 holding integers in [qmin, qmax]), both [..., 1].
    """
    low = tiles.float().amin(dim=-1, keepdim=True).clamp(max=0)
    high = tiles.float().amax(dim=-1, keepdim=True).clamp(min=0)
    scale = (high - low) / (qmax - qmin)
    scale = torch.where(scale == 0, TINY, scale)
    return scale, choose_zero_point(low, scale, qmin, qmax)


def choose_zero_point(low: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
    """The integer code of 0.0 that puts `low` at qmin, float32 in [qmin, qmax]."""
    return (qmin - low / scale).round().clamp(qmin, qmax)


def quantize_int(x: Tensor, scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int) -> Tensor:
    """Nearest codes, int8, in the shape of x; scale (and zero_point) broadcast against it."""
    codes = x.float() / scale.float()
    if zero_point is not None:
        codes = codes + zero_point.float()
    return codes.round().clamp(qmin, qmax).to(torch.int8)


def quantize_e4m3(x: Tensor, scale: Tensor) -> Tensor:
    """Nearest e4m3 values, saturating at ±448 (the cast itself turns overflow into NaN)."""
    return (x.float() / scale.float()).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """(code − zero_point) · scale, float32, in the shape of codes."""
    values = codes.float()
    if zero_point is not None:
        values = values - zero_point.float()
    return values * scale.float()
