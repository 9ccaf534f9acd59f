"""Scales of input channels folded into the weights before rounding: SmoothQuant for inputs, AWQ for weights.

Shape suffixes: K in_features.
"""

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from quantkit.algorithms.awq import awq_scale
from quantkit.algorithms.smoothquant import smoothquant_scale
from quantkit.arch.pairs import Heads, Link, Pair
from quantkit.calibration.folding import fold_scale
from quantkit.observers import InputStats
from quantkit.recipe import LinearPlan, QuantPlan


def smooths(plan: QuantPlan) -> bool:
    """Whether the plan scales input channels."""
    return bool({"awq", "smoothquant"} & {*plan.recipe.algorithms})


def is_scaled(pair: Pair, heads: Heads, rounded: Collection[str]) -> bool:
    """Whether the pair gets a scale: something behind it is rounded, and no two query heads share its channels.

    rounded: linears by names below the layer.
    """
    shares_values = pair.link is Link.VALUES and heads.num != heads.num_kv
    return not shares_values and any(name in rounded for name in pair.to)


def smoothed(
    plan: QuantPlan,
    pairs: Sequence[Pair],
    heads: Heads,
    tensors: Mapping[str, Tensor],
    linears: Mapping[str, LinearPlan],
    stats: Mapping[str, InputStats],
) -> dict[str, Tensor]:
    """The tensors that change, by names below the layer, float32; each pair scaled by what was seen of its input.

    linears: those that are rounded, by names below the layer, experts left out. stats: of their inputs, by group.
    """
    changed: dict[str, Tensor] = {}
    for pair in pairs:
        if not is_scaled(pair, heads, linears):
            continue
        first = next(linears[name] for name in pair.to if name in linears)
        now = {**tensors, **changed}
        scale_K = _scale(plan, first, [now[f"{name}.weight"] for name in pair.to], stats[first.group])
        changed |= fold_scale(now, pair, scale_K.cpu(), heads=heads, dtype=plan.scale_dtype)
    return changed


def _scale(plan: QuantPlan, linear: LinearPlan, weights: Sequence[Tensor], stats: InputStats) -> Tensor:
    there = [weight.to(stats.absmax_K.device) for weight in weights]
    if "awq" in plan.recipe.algorithms:
        return awq_scale(
            there, stats.absmean_K, stats.hessian_KK, linear.quantized_to.weight, plan.scale_dtype
        )
    return smoothquant_scale(stats.absmax_K, there)
