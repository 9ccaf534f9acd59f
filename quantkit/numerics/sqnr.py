"""Signal to quantization noise, summed over the parts of a tensor."""

import math

from torch import Tensor


def signal_and_noise(exact: Tensor, rounded: Tensor) -> tuple[float, float]:
    """Σ exact² and Σ (exact − rounded)², in float64; both of one shape, any float dtype."""
    assert exact.shape == rounded.shape, "one approximation per element"
    wide = exact.double()
    return wide.square().sum().item(), (wide - rounded.double()).square_().sum().item()


def decibels(signal: float, noise: float) -> float:
    """10 · log10(signal / noise); inf where there is no noise."""
    if noise == 0.0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf
