"""The second moments of an input, factorized once for all that reads it.

Shape suffixes: N out_features, K in_features.
"""

from typing import NamedTuple

import torch
from torch import Tensor

DAMPING = 0.01
RETRIES = 4  # each with ten times the damping


class Factor(NamedTuple):
    """Inverse second moments in factored form, for columns in descending order of their second moment.

    order_K: int64; column i of the factor is column order_K[i] of the weight. upper_KK: float32, upper triangular,
    upperᵀ · upper = (H + damping · mean(diag H) · I)⁻¹ in that order. dead_K: bool, inputs that were always 0.
    """

    order_K: Tensor
    upper_KK: Tensor
    dead_K: Tensor
    damping: float


def factorize(hessian_KK: Tensor, damping: float = DAMPING) -> Factor | None:
    """Factorize H (float32 [K, K], mean of x xᵀ), with more damping where it is not positive definite.

    None if H is not finite, or not positive definite even with damping · 10³. On a CPU the work is done in float64, on
    a GPU in float32. Peak memory: two K × K matrices. Source: arXiv:2210.17323 section 3.3; the order of columns is
    that of "act order".
    """
    diagonal_K = hessian_KK.diagonal()
    if not bool(torch.isfinite(hessian_KK).all()) or not bool((diagonal_K > 0).any()):
        return None
    dead_K = diagonal_K <= 0
    order_K = torch.argsort(diagonal_K, descending=True, stable=True)
    dtype = torch.float32 if hessian_KK.is_cuda else torch.float64
    # The inverse of a matrix whose rows and columns run backwards has its Cholesky factor on the other side: with
    # flip(H) = L Lᵀ, U = flip(L⁻¹) is upper triangular and Uᵀ U = H⁻¹. One factorization instead of two and an inverse.
    backwards_K = order_K.flip(0)
    for attempt in range(RETRIES):
        used = damping * 10.0**attempt
        flipped_KK = hessian_KK[backwards_K][:, backwards_K].to(dtype)
        flipped_KK.diagonal().add_(used * diagonal_K.mean().to(dtype) + dead_K[backwards_K].to(dtype))
        lower_KK, failed = torch.linalg.cholesky_ex(flipped_KK)
        if not int(failed):
            identity_KK = torch.eye(len(order_K), dtype=dtype, device=hessian_KK.device)
            inverse_KK = torch.linalg.solve_triangular(lower_KK, identity_KK, upper=False, out=identity_KK)
            return Factor(order_K, inverse_KK.flip(0, 1).float(), dead_K, used)
    return None

