"""Quantization of a linear's input, step by step as compressed-tensors does it inside transformers.

Every step is computed in the dtype of the activations (bf16 stays bf16), so that a checkpoint gives the same
logits here and there. Dynamic symmetric scale: amax / 127.5, or amax / 448 for FP8; a zero scale becomes the
dtype's machine epsilon.

Shape suffixes: T tokens, K in_features, G groups.
"""

import torch
from torch import Tensor

from quantkit.numerics.affine import E4M3_MAX
from quantkit.schemes.specs import FloatSpec, PerGroup, QParams, Spec


def fake_quantize_input(x_TK: Tensor, spec: Spec, static: QParams | None) -> Tensor:
    """The input after a round trip through its grid, in its own dtype. static: scale [1], if one is stored."""
    if isinstance(spec.granularity, PerGroup):
        tiles_TGK = x_TK.reshape(x_TK.shape[0], -1, spec.granularity.size)
        return round_trip(tiles_TGK, spec, QParams(dynamic_scale(tiles_TGK, spec))).flatten(-2)
    return round_trip(x_TK, spec, input_qparams(x_TK, spec, static))


def input_qparams(x_TK: Tensor, spec: Spec, static: QParams | None) -> QParams:
    """Scale (and zero point) of the input: the stored ones in the dtype of x, or one scale per token, [T, 1]."""
    if static is None:
        return QParams(dynamic_scale(x_TK, spec))
    return QParams(static.scale.to(x_TK.dtype), static.zero_point)


def dynamic_scale(tiles: Tensor, spec: Spec) -> Tensor:
    """Min-max scale over the last dimension, kept as 1, in the dtype of `tiles`."""
    half_range = E4M3_MAX if isinstance(spec, FloatSpec) else (spec.qmax - spec.qmin) / 2
    scale = tiles.abs().amax(dim=-1, keepdim=True) / half_range
    return scale.masked_fill(scale == 0, torch.finfo(tiles.dtype).eps)


def to_codes(x: Tensor, spec: Spec, qparams: QParams) -> Tensor:
    """Codes of x, still in the dtype of x."""
    scaled = x / qparams.scale
    if qparams.zero_point is not None:
        scaled = scaled + qparams.zero_point.to(x.dtype)
    if isinstance(spec, FloatSpec):
        return scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).to(x.dtype)
    return scaled.clamp(spec.qmin, spec.qmax).round()


def round_trip(x: Tensor, spec: Spec, qparams: QParams) -> Tensor:
    """Codes of x times their scale, in the dtype of x."""
    codes = to_codes(x, spec, qparams)
    if qparams.zero_point is not None:
        codes = codes - qparams.zero_point.to(x.dtype)
    return codes * qparams.scale
