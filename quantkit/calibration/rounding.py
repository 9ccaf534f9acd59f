"""Codes and scales of the linears that share an input, from their weights and what was seen of the input.

Shape suffixes: N out_features, K in_features.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantkit.algorithms.bias_correction import bias_correction
from quantkit.algorithms.factor import Factor, factorize
from quantkit.algorithms.gptq import gptq
from quantkit.algorithms.refine import refine
from quantkit.algorithms.rounded import Rounded, output_loss
from quantkit.algorithms.rtn import rtn
from quantkit.algorithms.static_qparams import static_qparams
from quantkit.algorithms.weight_correction import weight_correction
from quantkit.calibration.stopwatch import Stopwatch
from quantkit.formats.compressed_tensors import StoredLinear
from quantkit.numerics.sqnr import decibels, signal_and_noise
from quantkit.observers import InputStats
from quantkit.recipe import LinearPlan, QuantPlan
from quantkit.schemes import PerChannel, PerGroup, QParams
from quantkit.schemes.tiles import dequantize_weight

LOSS_WEIGHTS = 1 << 24  # so many at a time, so that the report takes little memory


class RoundedLinear(NamedTuple):
    """One linear as it is stored and as it computes. bias_N: what is to be added to its bias, or None.

    target_NK: what it stands for, float32, where its codes are yet to learn: the weight, or the corrected one.
    """

    stored: StoredLinear
    weight_NK: Tensor
    bias_N: Tensor | None
    note: dict[str, Any]
    target_NK: Tensor | None = None

    def without_weights(self) -> "RoundedLinear":
        """What is left to say and to store, once the layer computes with the weight."""
        return self._replace(weight_NK=self.weight_NK.new_empty(0), target_NK=None)


def learns(plan: QuantPlan) -> bool:
    """Whether rounding is where codes start from, to be learned with the whole layer."""
    return "signround" in plan.recipe.algorithms


def new_stats(plan: QuantPlan, num_features: int, device: torch.device, *, has_original: bool) -> InputStats:
    """Statistics with what the plan's algorithms ask for. has_original: the original's inputs will be given too."""
    algorithms = plan.recipe.algorithms
    with_hessian = has_original or bool({"gptq", "awq"} & {*algorithms})
    return InputStats(num_features, device=device, with_hessian=with_hessian, with_shift=has_original)


def round_linears(
    plan: QuantPlan,
    linears: Sequence[LinearPlan],
    weights: Mapping[str, Tensor],
    stats: InputStats,
    watch: Stopwatch,
) -> dict[str, RoundedLinear]:
    """Round linears of one scheme that read one input; weights by linear name, in any float dtype on any device."""
    with watch.measure("factorize"):
        factor = factorize(stats.hessian_KK) if "gptq" in plan.recipe.algorithms else None
    rounded: dict[str, RoundedLinear] = {}
    for together in _parts(linears, stats):
        rounded |= _round_together(plan, together, weights, factor, stats, watch)
    return rounded


def _parts(linears: Sequence[LinearPlan], stats: InputStats) -> list[Sequence[LinearPlan]]:
    """On a CPU linears whose scales belong to rows are rounded as one, which is faster and the same.

    On a GPU one linear is work enough, and memory is dear.
    """
    granularity = linears[0].quantized_to.weight.granularity
    if stats.device.type == "cuda" or not isinstance(granularity, PerChannel | PerGroup):
        return [[linear] for linear in linears]
    return [linears]


def _round_together(
    plan: QuantPlan,
    linears: Sequence[LinearPlan],
    weights: Mapping[str, Tensor],
    factor: Factor | None,
    stats: InputStats,
    watch: Stopwatch,
) -> dict[str, RoundedLinear]:
    exact = {linear.name: weights[linear.name].to(stats.device).float() for linear in linears}
    with watch.measure("factorize"):
        targets, troubles = _targets(exact, stats)
    if "gptq" in plan.recipe.algorithms and factor is None:
        troubles.append("rtn instead of gptq: the second moments of its input cannot be inverted")
    with watch.measure("scales"):
        starts = {
            linear.name: _nearest(plan, linear, targets[linear.name], stats.second_moment_K)
            for linear in linears
        }
    chosen = starts
    if factor is not None:
        with watch.measure("round"):
            chosen = _compensated(plan, linears, targets, factor, starts, stats)
    note = {"algorithm": "rtn" if factor is None else "gptq"}
    note |= {"fallback": "; ".join(troubles)} if troubles else {}
    rounded = {}
    for linear in linears:
        name = linear.name
        stored = StoredLinear(*chosen[name], _input_qparams(plan, linear, stats))
        with watch.measure("report"):
            loss_rtn = significant(_loss(targets[name], _dequantized(linear, starts[name]), stats))
            about = note | {"loss_rtn": loss_rtn}
            result = describe(plan, linear, stored, targets[name], exact[name], stats, about)
        rounded[name] = result._replace(target_NK=targets[name]) if learns(plan) else result
    return rounded


def _targets(weights: Mapping[str, Tensor], stats: InputStats) -> tuple[Mapping[str, Tensor], list[str]]:
    """What is to be approximated: the weights, or the ones that make up for what the layers before lost."""
    if not stats.has_shift:
        return weights, []
    corrected = {
        name: weight_correction(w_NK, stats.hessian_KK, stats.shift_KK) for name, w_NK in weights.items()
    }
    if any(w_NK is None for w_NK in corrected.values()):
        return weights, ["no weight_correction: the second moments of its input cannot be inverted"]
    return {name: w_NK for name, w_NK in corrected.items() if w_NK is not None}, []


def _nearest(plan: QuantPlan, linear: LinearPlan, target_NK: Tensor, importance_K: Tensor) -> Rounded:
    wanted_K = importance_K if linear.scales == "importance" else None
    spec = linear.quantized_to.weight
    return rtn(target_NK, spec, plan.scale_dtype, scales=linear.scales, importance_K=wanted_K)


def _compensated(
    plan: QuantPlan,
    linears: Sequence[LinearPlan],
    targets: Mapping[str, Tensor],
    factor: Factor,
    starts: Mapping[str, Rounded],
    stats: InputStats,
) -> dict[str, Rounded]:
    """GPTQ codes, of several linears as of one."""
    spec = linears[0].quantized_to.weight

    def compensate(w_NK: Tensor, qparams: QParams) -> Rounded:
        codes_NK = gptq(w_NK, factor, spec, qparams)
        if "refine" in plan.recipe.algorithms:
            return refine(w_NK, codes_NK, qparams, stats.hessian_KK, factor, spec)
        return Rounded(codes_NK, qparams)

    names = [linear.name for linear in linears]
    if len(names) == 1:
        return {names[0]: compensate(targets[names[0]], starts[names[0]].qparams)}
    scale = torch.cat([starts[name].qparams.scale for name in names])
    points = [point for name in names if (point := starts[name].qparams.zero_point) is not None]
    together = QParams(scale, torch.cat(points) if points else None)
    codes_NK, found = compensate(torch.cat([targets[name] for name in names]), together)
    ends = torch.tensor([len(targets[name]) for name in names]).cumsum(0).tolist()
    rows = [slice(end - len(targets[name]), end) for name, end in zip(names, ends, strict=True)]
    return {name: _rows(Rounded(codes_NK, found), part) for name, part in zip(names, rows, strict=True)}


def _rows(whole: Rounded, rows: slice) -> Rounded:
    zero_point = whole.qparams.zero_point
    qparams = QParams(whole.qparams.scale[rows], None if zero_point is None else zero_point[rows])
    return Rounded(whole.codes_NK[rows], qparams)


def _input_qparams(plan: QuantPlan, linear: LinearPlan, stats: InputStats) -> QParams | None:
    scheme = linear.quantized_to
    if not scheme.is_static or scheme.activation is None:
        return None
    spec = scheme.activation
    return static_qparams(stats.sample(), stats.absmax_K.amax(), spec, scale_dtype=plan.scale_dtype)


def describe(
    plan: QuantPlan,
    linear: LinearPlan,
    stored: StoredLinear,
    target_NK: Tensor,
    weight_NK: Tensor,
    stats: InputStats,
    note: Mapping[str, Any],
) -> RoundedLinear:
    """What is stored, as it computes, and what it costs added to the note.

    target_NK: what it stands for, float32; weight_NK: the original's. Both on the device of the statistics.
    """
    dequantized_NK = _dequantized(linear, stored)
    sqnr = decibels(*signal_and_noise(weight_NK, dequantized_NK))
    about = dict(note) | {
        "loss": significant(_loss(target_NK, dequantized_NK, stats)),
        "sqnr_db": round(sqnr, 3) if math.isfinite(sqnr) else None,
    }
    bias_N = None
    if "bias_correction" in plan.recipe.algorithms:
        bias_N = bias_correction(target_NK, dequantized_NK, stats.mean_K)
    return RoundedLinear(stored, dequantized_NK, bias_N, about)


def _dequantized(linear: LinearPlan, codes: Rounded | StoredLinear) -> Tensor:
    return dequantize_weight(codes.codes_NK, linear.quantized_to.weight.granularity, codes.qparams)


def _loss(target_NK: Tensor, dequantized_NK: Tensor, stats: InputStats) -> float:
    """Mean squared error of an output, with all second moments if they were gathered."""
    hessian = stats.hessian_KK if stats.has_hessian else stats.second_moment_K
    step = max(1, LOSS_WEIGHTS // target_NK.shape[1])
    parts = zip(torch.split(target_NK, step), torch.split(dequantized_NK, step), strict=True)
    total = sum(output_loss(target - found, hessian) * len(target) for target, found in parts)
    return total / len(target_NK)


def significant(value: float) -> float:
    """As many digits as a report needs."""
    return float(f"{value:.6g}")
