"""AWQ: weights of salient input channels are scaled up before rounding, the inputs down, as far as that helps.

Source: arXiv:2306.00978 section 3.2.
Shape suffixes: N out_features, K in_features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from quantkit.algorithms.rounded import output_loss
from quantkit.algorithms.rtn import rtn
from quantkit.schemes import Spec
from quantkit.schemes.tiles import dequantize_weight

NUM_RATIOS = 20


def awq_scale(
    weights: Sequence[Tensor],
    absmean_K: Tensor,
    hessian_KK: Tensor,
    spec: Spec,
    scale_dtype: torch.dtype,
    *,
    num_ratios: int = NUM_RATIOS,
) -> Tensor:
    """Per-input-channel scale of least output error when all linears of an input are rounded to nearest.

    weights: all linears [N, K] that read the input, any float dtype. absmean_K: mean |x|, hessian_KK: mean of x xᵀ,
    both float32. Ratios 0, 1/num_ratios … 1 are tried; 0 changes nothing, so the result is never worse than that.
    Returns float32 [K], > 0; weights are multiplied by it, inputs divided.
    """
    ratios = [step / num_ratios for step in range(num_ratios + 1)]
    scales = [scale_at(absmean_K, ratio) for ratio in ratios]
    losses = [
        sum(_loss(w_NK, scale_K, hessian_KK, spec, scale_dtype) for w_NK in weights) for scale_K in scales
    ]
    return scales[losses.index(min(losses))]


def scale_at(absmean_K: Tensor, ratio: float) -> Tensor:
    """Scale at one point of the grid: absmean ** ratio, normalised so that sqrt(max · min) is 1.

    A channel that never fired is taken for the smallest that did; if none did, all are 1.
    """
    absmean_K = absmean_K.float()
    if not bool((absmean_K > 0).any()):
        return torch.ones_like(absmean_K)
    scale_K = absmean_K.clamp(min=absmean_K[absmean_K > 0].min()) ** ratio
    return scale_K / (scale_K.max() * scale_K.min()).sqrt()


def _loss(w_NK: Tensor, scale_K: Tensor, hessian_KK: Tensor, spec: Spec, scale_dtype: torch.dtype) -> float:
    """Summed squared error of the outputs of one linear, if its scaled weight is rounded."""
    importance_K = hessian_KK.diagonal() / scale_K.square()
    codes_NK, qparams = rtn(
        w_NK.float() * scale_K, spec, scale_dtype, scales="importance", importance_K=importance_K
    )
    error_NK = w_NK.float() - dequantize_weight(codes_NK, spec.granularity, qparams) / scale_K
    return output_loss(error_NK, hessian_KK) * len(w_NK)
