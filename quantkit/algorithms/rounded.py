"""What rounding a weight gives, and what the rounding costs at the linear's output.

Shape suffixes: N out_features, K in_features.
"""

from typing import NamedTuple

from torch import Tensor

from quantkit.schemes import QParams


class Rounded(NamedTuple):
    """Codes and scales of one weight. codes_NK: int8 or float8_e4m3fn. qparams: in the dtype and shape on disk."""

    codes_NK: Tensor
    qparams: QParams


def output_loss(error_NK: Tensor, hessian: Tensor) -> float:
    """Mean squared error of an output, E|(W − Ŵ) x|² / N.

    error_NK: W − Ŵ, float32. hessian: mean of x xᵀ [K, K], or only its diagonal [K], float32.
    """
    if hessian.ndim == 1:
        return (error_NK.square() @ hessian).double().mean().item()
    return ((error_NK @ hessian) * error_NK).sum(dim=1).double().mean().item()
