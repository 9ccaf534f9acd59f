"""Scales of a quantized KV cache: which are worth trying, and which of them to take, by the error they make.

An integer grid trades clipping against step size, so its candidates are shares of amax / 127. The steps of e4m3 grow
with the value: within its range a scale only moves where values fall between two codes, the same at every power of
two, so its candidates span one octave without clipping; and 1.0, which every loader has, is the one to beat.

Shape suffixes: C candidates, H KV heads, S samples.
"""

import torch
from torch import Tensor

from quantkit.numerics.kv_codes import LARGEST, KVDtype

INT8_SHARES = (1.0, 0.9, 0.8, 0.7)
FP8_STEPS = 4  # of an octave


def scale_candidates(absmax_H: Tensor, dtype: KVDtype, scale_dtype: torch.dtype, *, per_head: bool) -> Tensor:
    """Scales to try, float32 [C, H], rounded to scale_dtype; the first is what to take without good reason.

    absmax_H: float32, of the keys or of the values. Without per_head all heads share a candidate.
    """
    if not per_head:
        absmax_H = absmax_H.amax().expand_as(absmax_H)
    smallest_H = (absmax_H / LARGEST[dtype]).clamp(min=torch.finfo(scale_dtype).tiny)
    if dtype == "int8":
        scales_CH = torch.tensor(INT8_SHARES, device=absmax_H.device)[:, None] * smallest_H
    else:
        steps_C = 2.0 ** (torch.arange(FP8_STEPS, device=absmax_H.device) / FP8_STEPS)
        scales_CH = torch.cat([torch.ones_like(smallest_H)[None], steps_C[:, None] * smallest_H])
    return scales_CH.to(scale_dtype).float()


def choose_scales(candidates_CH: Tensor, errors_CSH: Tensor, *, per_head: bool) -> Tensor:
    """The scale of each head, [H, 1, 1], or without per_head of all, [1].

    errors_CSH: squared error of each sample, of what a head does. A candidate has to beat the first by more than
    the standard error of the difference between the two; of those that do, the best in the mean.
    """
    if not per_head:
        errors_CSH = errors_CSH.sum(dim=2, keepdim=True)
        candidates_CH = candidates_CH[:, :1]
    gain_CSH = errors_CSH[:1] - errors_CSH
    mean_CH = gain_CSH.mean(dim=1)
    spread_CH = gain_CSH.std(dim=1, correction=0) / gain_CSH.shape[1] ** 0.5
    best_H = mean_CH.masked_fill(mean_CH <= spread_CH, 0.0).argmax(dim=0)  # ties: the first
    scale_H = candidates_CH.gather(0, best_H[None])[0]
    return scale_H.view(-1, 1, 1) if per_head else scale_H
