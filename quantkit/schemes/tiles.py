"""A weight and its granularity as tiles, and the one formula applied to whole weights.

Shape suffixes: N out_features, K in_features, G groups.
"""

import torch
from torch import Tensor

from quantkit.numerics import affine
from quantkit.schemes.specs import (
    FloatSpec,
    Granularity,
    IntSpec,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    QParams,
    Spec,
)


def scale_shape(granularity: Granularity, num_rows: int, num_cols: int) -> tuple[int, ...]:
    """Shape of the scale of a weight [num_rows, num_cols], as it is on disk."""
    match granularity:
        case PerTensor():
            return (1,)
        case PerChannel():
            return (num_rows, 1)
        case PerGroup(size):
            assert num_cols % size == 0, "refused by the plan"
            return (num_rows, num_cols // size)
        case PerBlock(rows, cols):
            return (-(-num_rows // rows), -(-num_cols // cols))
        case _:
            raise AssertionError(f"{granularity} is not for weights")


def to_tiles(w_NK: Tensor, granularity: Granularity) -> Tensor:
    """The weight as [..., elements of one scale]; edge blocks are padded with zeros.

    Per tensor [1, N·K], per channel [N, 1, K], per group [N, G, size], per block [Nb, Kb, rows·cols].
    """
    num_rows, num_cols = w_NK.shape
    match granularity:
        case PerTensor():
            return w_NK.reshape(1, -1)
        case PerChannel():
            return w_NK.unsqueeze(1)
        case PerGroup(size):
            return w_NK.reshape(num_rows, num_cols // size, size)
        case PerBlock(rows, cols):
            padded = torch.nn.functional.pad(w_NK, (0, -num_cols % cols, 0, -num_rows % rows))
            blocks = padded.reshape(padded.shape[0] // rows, rows, padded.shape[1] // cols, cols)
            return blocks.permute(0, 2, 1, 3).flatten(2)
        case _:
            raise AssertionError(f"{granularity} is not for weights")


def from_tiles(tiles: Tensor, granularity: Granularity, num_rows: int, num_cols: int) -> Tensor:
    """The inverse of `to_tiles`: [num_rows, num_cols], padding dropped."""
    if isinstance(granularity, PerBlock):
        rows, cols = granularity.rows, granularity.cols
        blocks = tiles.reshape(tiles.shape[0], tiles.shape[1], rows, cols).permute(0, 2, 1, 3)
        padded = blocks.reshape(tiles.shape[0] * rows, tiles.shape[1] * cols)
        return padded[:num_rows, :num_cols].contiguous()
    return tiles.reshape(num_rows, num_cols)


def expand_to_weight(qparam: Tensor, granularity: Granularity, num_rows: int, num_cols: int) -> Tensor:
    """A scale or zero point in its shape on disk, repeated for every weight: a view or copy [num_rows, num_cols]."""
    match granularity:
        case PerTensor() | PerChannel():
            return qparam.reshape(-1, 1).expand(num_rows, num_cols)
        case PerGroup(size):
            return qparam.repeat_interleave(size, dim=1)
        case PerBlock(rows, cols):
            by_row = qparam.repeat_interleave(rows, dim=0)[:num_rows]
            return by_row.repeat_interleave(cols, dim=1)[:, :num_cols]
        case _:
            raise AssertionError(f"{granularity} is not for weights")


def quantize_weight(w_NK: Tensor, spec: Spec, qparams: QParams) -> Tensor:
    """Nearest codes [N, K] on the grid that spec and qparams describe: int8, or float8_e4m3fn."""
    tiles = to_tiles(w_NK, spec.granularity)
    scale = qparams.scale.unsqueeze(-1)
    if isinstance(spec, FloatSpec):
        codes = affine.quantize_e4m3(tiles, scale)
    else:
        zero_point = None if qparams.zero_point is None else qparams.zero_point.unsqueeze(-1)
        codes = affine.quantize_int(tiles, scale, zero_point, spec.qmin, spec.qmax)
    return from_tiles(codes, spec.granularity, *w_NK.shape)


def dequantize_weight(codes_NK: Tensor, granularity: Granularity, qparams: QParams) -> Tensor:
    """(code − zero_point) · scale, float32 [N, K]."""
    tiles = to_tiles(codes_NK.float(), granularity)
    zero_point = None if qparams.zero_point is None else qparams.zero_point.unsqueeze(-1)
    values = affine.dequantize(tiles, qparams.scale.unsqueeze(-1), zero_point)
    return from_tiles(values, granularity, *codes_NK.shape)


def minmax_qparams(w_NK: Tensor, spec: Spec, scale_dtype: torch.dtype) -> QParams:
    """Min-max scale (rounded to scale_dtype) and zero point of a weight."""
    tiles = to_tiles(w_NK, spec.granularity)
    if isinstance(spec, IntSpec) and not spec.symmetric:
        scale, zero_point = affine.choose_asymmetric(tiles, spec.qmin, spec.qmax)
        return QParams(round_scale(scale, scale_dtype).squeeze(-1), zero_point.squeeze(-1).to(torch.int8))
    half_range = affine.E4M3_MAX if isinstance(spec, FloatSpec) else (spec.qmax - spec.qmin) / 2
    return QParams(round_scale(affine.choose_symmetric(tiles, half_range), scale_dtype).squeeze(-1))


def round_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale in its dtype on disk, sign kept and never 0: what underflows becomes the smallest number."""
    # float16 has use for subnormals
    smallest = 2.0**-24 if dtype == torch.float16 else torch.finfo(dtype).tiny
    return torch.where(scale.abs() < smallest, smallest, scale).to(dtype)
