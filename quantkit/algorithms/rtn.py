"""Round to nearest: each weight goes to the closest code of a grid chosen per tile."""

from typing import Literal

import torch
from torch import Tensor

from quantkit.algorithms.rounded import Rounded
from quantkit.algorithms.scale_search import search_qparams
from quantkit.schemes import Spec
from quantkit.schemes.tiles import minmax_qparams, quantize_weight


def rtn(
    w_NK: Tensor,
    spec: Spec,
    scale_dtype: torch.dtype,
    *,
    scales: Literal["minmax", "mse", "importance"] = "mse",
    importance_K: Tensor | None = None,
) -> Rounded:
    """Nearest codes on the min-max grid or on the one of least (importance-weighted) squared error.

    w_NK: any float dtype. importance_K: see `search_qparams`; given exactly for `importance`.
    """
    assert (importance_K is not None) == (scales == "importance"), "importance is what is asked for and given"
    if scales == "minmax":
        qparams = minmax_qparams(w_NK, spec, scale_dtype)
    else:
        qparams = search_qparams(w_NK, spec, scale_dtype, importance_K)
    return Rounded(quantize_weight(w_NK, spec, qparams), qparams)
