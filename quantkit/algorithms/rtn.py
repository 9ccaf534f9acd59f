"""Round to nearest: each weight goes to the closest code of a grid chosen per tile."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from quantkit.algorithms.scale_search import search_qparams
from quantkit.schemes import QParams, Spec
from quantkit.schemes.tiles import minmax_qparams, quantize_weight


class RtnResult(NamedTuple):
    """codes_NK: int8 or float8_e4m3fn. qparams: in the dtype and shape on disk."""

    codes_NK: Tensor
    qparams: QParams


def rtn(
    w_NK: Tensor,
    spec: Spec,
    scale_dtype: torch.dtype,
    *,
    scales: Literal["minmax", "mse", "importance"] = "mse",
    importance_K: Tensor | None = None,
) -> RtnResult:
    """Nearest codes on the min-max grid or on the one of least (importance-weighted) squared error.

    w_NK: any float dtype. importance_K: see `search_qparams`; given exactly for `importance`.
    """
    assert (importance_K is not None) == (scales == "importance"), "importance is what is asked for and given"
    if scales == "minmax":
        qparams = minmax_qparams(w_NK, spec, scale_dtype)
    else:
        qparams = search_qparams(w_NK, spec, scale_dtype, importance_K)
    return RtnResult(quantize_weight(w_NK, spec, qparams), qparams)
