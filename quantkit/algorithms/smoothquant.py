"""SmoothQuant: large input channels are made smaller, and their weights larger, before both are quantized.

Source: arXiv:2211.10438 equation 4.
Shape suffixes: N out_features, K in_features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

ALPHA = 0.5


def smoothquant_scale(absmax_K: Tensor, weights: Sequence[Tensor], alpha: float = ALPHA) -> Tensor:
    """Per-input-channel scale s = absmax_x ** alpha / absmax_w ** (1 − alpha): inputs are divided, weights multiplied.

    absmax_K: largest |x| of each channel, float32. weights: all linears [N, K] that read the input. alpha: 0 leaves
    all of the difficulty to the inputs, 1 to the weights.
    Returns float32 [K], > 0; 1 where the input or the weights are all 0.
    """
    assert 0 <= alpha <= 1, "a share of the difficulty"
    weight_K = torch.stack([w_NK.float().abs().amax(dim=0) for w_NK in weights]).amax(dim=0)
    scale_K = absmax_K.float() ** alpha / weight_K ** (1 - alpha)
    is_alive_K = (absmax_K > 0) & (weight_K > 0)
    return torch.where(is_alive_K & torch.isfinite(scale_K) & (scale_K > 0), scale_K, 1.0)
