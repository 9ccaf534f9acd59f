"""Weights that give the original's outputs from the inputs which quantized layers deliver.

Behind quantized layers a linear gets x instead of the original's x̃. The weights that minimize E|W x̃ − W' x|² are
W' = W + W · E[(x̃ − x) xᵀ] · E[x xᵀ]⁻¹; around them the error is again (W' − Ŵ) H (W' − Ŵ)ᵀ, so that any rounding can
follow. Source: arXiv:2504.02692 section 3 (there inside the rounding), arXiv:2505.11695 section 3.

Shape suffixes: N out_features, K in_features.
"""

import torch
from torch import Tensor

from quantkit.algorithms.factor import DAMPING, precision


def weight_correction(
    w_NK: Tensor, hessian_KK: Tensor, shift_KK: Tensor, damping: float = DAMPING
) -> Tensor | None:
    """Corrected weights, float32 [N, K]; None if the second moments cannot be inverted.

    hessian_KK: mean of x xᵀ. shift_KK: mean of (x̃ − x) xᵀ. Both float32 [K, K].
    """
    dtype = precision(hessian_KK)
    damped_KK = hessian_KK.to(dtype, copy=True)
    damped_KK.diagonal().add_(damping * hessian_KK.diagonal().mean().to(dtype))
    lower_KK, failed = torch.linalg.cholesky_ex(damped_KK)
    if int(failed) or not bool(torch.isfinite(shift_KK).all()):
        return None
    wanted_KN = (w_NK.to(dtype) @ shift_KK.to(dtype)).T
    return w_NK.float() + torch.cholesky_solve(wanted_KN, lower_KK).T.float()
