"""Linears as their checkpoint has them, and which of them one product can compute side by side.

q, k and v read the same input, and so do gate and up: with their rows one below the other they are one product, where
everything that the product needs is of one kind.

Shape suffixes: N out_features, K in_features.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.formats.compressed_tensors import StoredLinear
from quantkit.schemes import PerBlock, PerChannel, PerGroup, PerTensor, PerToken, QParams, Scheme, Spec
from quantkit_kernels.weight import LinearWeight


class LinearPart(NamedTuple):
    """One linear. name: of its module. weight: [N, K], dense where there is no scheme; input_qparams: static ones."""

    name: str
    weight: LinearWeight | Tensor
    scheme: Scheme | None = None
    input_qparams: QParams | None = None
    bias_N: Tensor | None = None


def quantized_part(name: str, stored: StoredLinear, scheme: Scheme, bias_N: Tensor | None) -> LinearPart:
    """A linear as it was read, in the kernels' terms."""
    return LinearPart(name, as_linear_weight(stored, scheme.weight), scheme, stored.input_qparams, bias_N)


def join(parts: Sequence[LinearPart]) -> list[LinearPart]:
    """The same linears, those made one that are neighbours and alike."""
    runs = [[parts[0]]]
    for part in parts[1:]:
        if _can_follow(runs[-1][-1], part):
            runs[-1].append(part)
        else:
            runs.append([part])
    return [_joined(run) if len(run) > 1 else run[0] for run in runs]


def _can_follow(first: LinearPart, second: LinearPart) -> bool:
    """Whether the rows of `second` can stand below those of `first` in one weight."""
    if first.scheme != second.scheme or (first.bias_N is None) != (second.bias_N is None):
        return False
    if isinstance(first.weight, Tensor) or isinstance(second.weight, Tensor):
        return True
    ends_with_a_tile = _has_one_scale(first) or len(first.weight.codes_NK) % first.weight.tile[0] == 0
    return ends_with_a_tile and _same_input(first.input_qparams, second.input_qparams)


def _same_input(first: QParams | None, second: QParams | None) -> bool:
    if first is None or second is None:
        return first is second
    pairs = zip(first, second, strict=True)
    return all(a is b is None or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


def _joined(parts: Sequence[LinearPart]) -> LinearPart:
    first = parts[0]
    name = ", ".join([first.name, *(part.name.rpartition(".")[2] for part in parts[1:])])
    biases = [part.bias_N for part in parts if part.bias_N is not None]
    return first._replace(
        name=name,
        weight=_weights_joined([_with_scale_per_row(part) for part in parts]),
        bias_N=torch.cat(biases) if biases else None,
    )


def _weights_joined(weights: Sequence[LinearWeight | Tensor]) -> LinearWeight | Tensor:
    dense = [weight for weight in weights if isinstance(weight, Tensor)]
    if dense:
        return torch.cat(dense)
    quantized = [weight for weight in weights if isinstance(weight, LinearWeight)]
    zero_points = [weight.zero_point_RG for weight in quantized if weight.zero_point_RG is not None]
    codes = torch.cat(
        [weight.codes_NK.view(torch.int8) for weight in quantized]
    )  # float8 cannot be joined on a CPU
    return quantized[0]._replace(
        codes_NK=codes.view(quantized[0].codes_NK.dtype),
        scale_RG=torch.cat([weight.scale_RG for weight in quantized]),
        zero_point_RG=torch.cat(zero_points) if zero_points else None,
    )


def _has_one_scale(part: LinearPart) -> bool:
    return part.scheme is not None and isinstance(part.scheme.weight.granularity, PerTensor)


def _with_scale_per_row(part: LinearPart) -> LinearWeight | Tensor:
    """The weight, with one scale for all rows become one for each."""
    if isinstance(part.weight, Tensor) or not _has_one_scale(part):
        return part.weight
    num_rows, num_cols = part.weight.codes_NK.shape
    return part.weight._replace(scale_RG=part.weight.scale_RG.expand(num_rows, 1), tile=(1, num_cols))


def as_linear_weight(stored: StoredLinear, spec: Spec) -> LinearWeight:
    """A stored weight in the kernels' terms: scales as a 2-D grid of tiles."""
    num_rows, num_cols = stored.codes_NK.shape
    match spec.granularity:
        case PerTensor():
            tile = (num_rows, num_cols)
        case PerChannel():
            tile = (1, num_cols)
        case PerGroup(size):
            tile = (1, size)
        case PerBlock(rows, cols):
            tile = (rows, cols)
        case PerToken():
            raise AssertionError("no weight has tokens")
    scale, zero_point = stored.qparams
    grid = (-(-num_rows // tile[0]), -(-num_cols // tile[1]))
    zero_grid = None if zero_point is None else zero_point.reshape(grid)
    return LinearWeight(stored.codes_NK, scale.reshape(grid), zero_grid, tile, spec.bits)
