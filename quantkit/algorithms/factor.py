"""The second moments of an input, factorized once for all that reads it.

Shape suffixes: K in_features.
"""

from typing import NamedTuple

import torch
from torch import Tensor

DAMPING = 0.01
FLOAT64_FEATURES = 4096
RETRIES = 4  # each with ten times the damping


class Factor(NamedTuple):
    """Second moments in factored form, for columns in ascending order of their second moment.

    order_K: int64; column i of the factor is column order_K[i] of the weight. lower_KK: float32, lower triangular,
    lower · lowerᵀ = H + damping · mean(diag H) · I in that order. dead_K: bool, inputs that were always 0, in the order
    of the weight.
    """

    order_K: Tensor
    lower_KK: Tensor
    dead_K: Tensor
    damping: float


def factorize(hessian_KK: Tensor, damping: float = DAMPING) -> Factor | None:
    """Factorize H (float32 [K, K], mean of x xᵀ), with more damping where it is not positive definite.

    None if H is not finite, or not positive definite even with damping · 10³. Peak memory: H, one more K × K matrix
    in float32 and one in `precision`.
    """
    diagonal_K = hessian_KK.diagonal()
    # a row of H with a NaN or an infinity has one on its diagonal
    if not bool(torch.isfinite(diagonal_K).all()) or not bool((diagonal_K > 0).any()):
        return None
    dead_K = diagonal_K <= 0
    order_K = torch.argsort(diagonal_K, stable=True)
    for attempt in range(RETRIES):
        used = damping * 10.0**attempt
        # one dimension after the other: a GPU would make two K × K matrices of int64 for both at once
        damped_KK = hessian_KK[order_K].index_select(1, order_K).to(precision(hessian_KK))
        damped_KK.diagonal().add_(
            used * diagonal_K.mean().to(damped_KK.dtype) + dead_K[order_K].to(damped_KK.dtype)
        )
        lower_KK = _cholesky_in_place(damped_KK)
        if lower_KK is not None:
            return Factor(order_K, lower_KK.float(), dead_K, used)
    return None


def precision(hessian_KK: Tensor) -> torch.dtype:
    """float64, but float32 on a GPU where that takes too much of its memory."""
    return torch.float32 if hessian_KK.is_cuda and len(hessian_KK) > FLOAT64_FEATURES else torch.float64


def _cholesky_in_place(symmetric_KK: Tensor) -> Tensor | None:
    """The lower factor, in the memory of the matrix, which is symmetric and contiguous; None if there is none."""
    columns_KK = symmetric_KK.mT  # the same matrix in the order that LAPACK and cuSOLVER write without a copy
    failed = torch.empty((), dtype=torch.int32, device=symmetric_KK.device)
    torch.linalg.cholesky_ex(columns_KK, out=(columns_KK, failed))
    return None if int(failed) else columns_KK
