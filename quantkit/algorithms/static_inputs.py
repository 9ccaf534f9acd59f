"""One scale (and zero point) for all inputs of a linear, from a sample of them.

Shape suffixes: T tokens, K in_features.
"""

import torch
from torch import Tensor

from quantkit.numerics import affine
from quantkit.schemes import FloatSpec, IntSpec, QParams, Spec

RATIOS = tuple(round(1.0 - 0.02 * step, 2) for step in range(36))


def static_qparams(sample_TK: Tensor, absmax: Tensor, spec: Spec) -> QParams:
    """Scale float32 [1] (and zero point int8 [1]) of least squared error over the sample.

    absmax: largest magnitude of all inputs, also those not in the sample. Candidates are the range that holds
    everything, times ratios from 0.3 to 1: clipping the rarest values buys precision for the others. FP8 has
    as many steps at every magnitude, so it is not clipped: absmax / 448.
    """
    if isinstance(spec, FloatSpec):
        scale = affine.choose_symmetric(absmax.reshape(1, 1), affine.E4M3_MAX)
        return QParams(scale.reshape(1))
    low, high = sample_TK.amin().clamp(max=0), sample_TK.amax().clamp(min=0)
    best: tuple[float, QParams] | None = None
    for ratio in RATIOS:
        qparams = _candidate(low * ratio, high * ratio, absmax * ratio, spec)
        codes = affine.quantize_int(sample_TK, qparams.scale, qparams.zero_point, spec.qmin, spec.qmax)
        error = (
            (affine.dequantize(codes, qparams.scale, qparams.zero_point) - sample_TK).square().mean().item()
        )
        if best is None or error < best[0]:
            best = (error, qparams)
    assert best is not None, "there are candidates"
    return best[1]


def _candidate(low: Tensor, high: Tensor, absmax: Tensor, spec: IntSpec) -> QParams:
    if spec.symmetric:
        return QParams(affine.choose_symmetric(absmax.reshape(1, 1), (spec.qmax - spec.qmin) / 2).reshape(1))
    ends = torch.stack([low, high]).reshape(1, 2)
    scale, zero_point = affine.choose_asymmetric(ends, spec.qmin, spec.qmax)
    return QParams(scale.reshape(1), zero_point.reshape(1).to(torch.int8))
