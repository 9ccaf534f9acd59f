"""The second moments of an input, factorized once for all linears that read it.

Shape suffixes: K in_features.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.errors import CalibrationError

DAMPING = 0.01
NUM_RETRIES = 3  # each with ten times the damping


class Factor(NamedTuple):
    """H + damping · I = R Rᵀ, for columns in descending order of their second moment.

    order_K: int64; column i of R belongs to column order_K[i] of the weight. upper_KK: R, float32, upper triangular.
    hessian_KK: H in the weight's order, as it was given. damping: what was added to its diagonal, absolute.
    """

    order_K: Tensor
    upper_KK: Tensor
    hessian_KK: Tensor
    damping: float

    @property
    def importance_K(self) -> Tensor:
        """What an error of a column costs that no later column makes up for: R[c, c]², in the weight's order.

        At most the second moment, and the less the better later columns predict this one. As importance of the scale
        search it belongs to gptq as the second moments do to rtn.
        """
        importance_K = torch.empty_like(self.upper_KK.diagonal())
        importance_K[self.order_K] = self.upper_KK.diagonal().square()
        return importance_K


def factorize(hessian_KK: Tensor, damping: float = DAMPING) -> Factor | None:
    """Factorize H (float32 [K, K], mean of x xᵀ) + damping · mean(diag H).

    What fails in float32 is tried in float64, then with more damping; None if nothing helps, so H is far from
    positive semi-definite. Peak memory: three K × K matrices. Raises CalibrationError if H is not finite.
    Source: arXiv:2210.17323 section 3.3 for the damping; the order is what implementations call act-order.
    """
    if not bool(torch.isfinite(hessian_KK).all()):
        raise CalibrationError(
            "the second moments of an input are not finite: its values are beyond 10¹⁸",
            fix="look at the model's weights: its activations overflow; or use a data-free recipe",
        )
    order_K = torch.argsort(hessian_KK.diagonal(), descending=True, stable=True)
    unit = (
        hessian_KK.diagonal().double().mean().item() or 1.0
    )  # an input that was always 0: any damping will do
    attempts = [(torch.float32, damping)]
    attempts += [(torch.float64, damping * 10.0**retry) for retry in range(NUM_RETRIES + 1)]
    for dtype, relative in attempts:
        upper_KK = _upper_factor(hessian_KK, order_K, relative * unit, dtype)
        if upper_KK is not None:
            return Factor(order_K, upper_KK, hessian_KK, relative * unit)
    return None


def _upper_factor(hessian_KK: Tensor, order_K: Tensor, damping: float, dtype: torch.dtype) -> Tensor | None:
    """R of the reordered matrix, or None if it is not positive definite.

    The Cholesky factor of the matrix with rows and columns backwards is R backwards.
    """
    backwards_K = order_K.flip(0)
    matrix_KK = hessian_KK[backwards_K][:, backwards_K].to(dtype)
    matrix_KK.diagonal().add_(damping)
    lower_KK, failed = torch.linalg.cholesky_ex(matrix_KK)
    if int(failed) or not bool((lower_KK.diagonal() > 0).all()):
        return None
    upper_KK: Tensor = lower_KK.flip(0, 1).float()
    return upper_KK
