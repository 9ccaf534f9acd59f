"""Signal to quantization noise, of tensors of any size."""

import math

from torch import Tensor

CHUNK_ELEMENTS = 1 << 22


def sqnr_db(reference: Tensor, approximation: Tensor) -> float:
    """10 · log10(Σ reference² / Σ (reference − approximation)²), in dB; inf where they are equal.

    Both of one shape, any float dtype; accumulates in float64 with 64 MB of temporaries.
    """
    assert reference.shape == approximation.shape, "one approximation per element"
    signal = noise = 0.0
    exact_flat, rounded_flat = reference.reshape(-1), approximation.reshape(-1)
    for start in range(0, exact_flat.numel(), CHUNK_ELEMENTS):
        exact = exact_flat[start : start + CHUNK_ELEMENTS].double()
        signal += float(exact.square().sum())
        noise += float((exact - rounded_flat[start : start + CHUNK_ELEMENTS].double()).square().sum())
    if noise == 0.0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf
