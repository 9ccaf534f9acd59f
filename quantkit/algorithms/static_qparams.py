"""One scale (and zero point) for all inputs of a linear, from a sample of them.

Shape suffixes: T tokens, K in_features.
"""

import torch
from torch import Tensor

from quantkit.numerics import affine
from quantkit.schemes import FloatSpec, IntSpec, QParams, Spec

RATIOS = tuple(round(1.0 - 0.02 * step, 2) for step in range(36))
MAX_ELEMENTS = 1 << 19  # of the sample: more changes the best ratio no further


def static_qparams(
    sample_TK: Tensor, absmax: Tensor, spec: Spec, *, scale_dtype: torch.dtype = torch.float32
) -> QParams:
    """Scale [1] in scale_dtype (and zero point int8 [1] for an asymmetric grid) of a linear's input.

    sample_TK: some of its inputs, float32. absmax: largest magnitude of all inputs, also those not in the sample.
    The range is the one that holds everything times the ratio, from 0.3 to 1, of least squared error over the sample:
    clipping the rarest values buys precision for the others.
    """
    values = sample_TK[:: -(-sample_TK.numel() // MAX_ELEMENTS)].float().flatten()
    low, high = _full_range(values, absmax)
    candidates = [_from_range(low * ratio, high * ratio, spec, scale_dtype) for ratio in RATIOS]
    errors = torch.stack([_squared_error(values, qparams, spec) for qparams in candidates])
    return candidates[int(errors.argmin())]


def _full_range(values: Tensor, absmax: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest input; the longer side reaches to absmax, which the sample may have missed."""
    low, high = values.amin().clamp(max=0), values.amax().clamp(min=0)
    if bool(high >= -low):
        return low, torch.maximum(high, absmax)
    return torch.minimum(low, -absmax), high


def _from_range(low: Tensor, high: Tensor, spec: Spec, scale_dtype: torch.dtype) -> QParams:
    ends = torch.stack([low, high]).reshape(1, 2)
    if isinstance(spec, IntSpec) and not spec.symmetric:
        scale, zero_point = affine.choose_asymmetric(ends, spec.qmin, spec.qmax)
        return QParams(scale.reshape(1).to(scale_dtype), zero_point.reshape(1).to(torch.int8))
    half_range = affine.E4M3_MAX if isinstance(spec, FloatSpec) else (spec.qmax - spec.qmin) / 2
    return QParams(affine.choose_symmetric(ends, half_range).reshape(1).to(scale_dtype))


def _squared_error(values: Tensor, qparams: QParams, spec: Spec) -> Tensor:
    scale = qparams.scale.float()
    if isinstance(spec, FloatSpec):
        codes = affine.quantize_e4m3(values, scale)
    else:
        codes = affine.quantize_int(values, scale, qparams.zero_point, spec.qmin, spec.qmax)
    return (affine.dequantize(codes, scale, qparams.zero_point) - values).square().mean()
