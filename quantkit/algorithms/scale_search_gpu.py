"""The scale search on a GPU: the tiles of a weight and their importance, as its kernel takes them.

Shape suffixes: N out_features, K in_features, P periods of the importance, S elements of a tile.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from quantkit.schemes import FloatSpec, Granularity, IntSpec, PerBlock, PerGroup, PerTensor, QParams, Spec
from quantkit.schemes.tiles import to_tiles
from quantkit_kernels.scale_search import MAX_SIZE, scale_search


def search_on_gpu(
    w_NK: Tensor,
    spec: Spec,
    scale_dtype: torch.dtype,
    importance_K: Tensor | None,
    ratios: Sequence[float],
    steps: Sequence[float],
) -> QParams | None:
    """What `search_qparams` returns, but for the order of summation; None where a tile is too large for the kernel."""
    if isinstance(spec.granularity, PerTensor):
        return None
    tiles = to_tiles(w_NK, spec.granularity)
    if tiles.shape[-1] > MAX_SIZE:
        return None
    importance_PS = None if importance_K is None else _importance(importance_K.float(), spec.granularity)
    qmin, qmax = (0, 0) if isinstance(spec, FloatSpec) else (spec.qmin, spec.qmax)
    scale, zero_point = scale_search(
        tiles.flatten(0, 1), importance_PS, list(ratios), list(steps), _grid(spec), qmin, qmax, scale_dtype
    )
    lead = tiles.shape[:-1]
    return QParams(scale.view(lead), None if spec.symmetric else zero_point.view(lead))


def _importance(importance_K: Tensor, granularity: Granularity) -> Tensor:
    """The importance of the elements of each tile in a row of tiles, [P, S]."""
    match granularity:
        case PerGroup(size):
            return importance_K.reshape(-1, size)
        case PerBlock(rows, _):
            return to_tiles(importance_K.expand(rows, -1), granularity)[0]
        case _:
            return importance_K.unsqueeze(0)


def _grid(spec: Spec) -> str:
    if isinstance(spec, IntSpec):
        if not spec.symmetric:
            return "asymmetric"
        return "either sign" if spec.bits <= 4 else "symmetric"
    return "e4m3"
