"""Codes and scales of a rounded layer, learned together from the layer's output: the algorithm `signround`.

What a linear's rounding knew is kept (`Start`) until all linears of its layer are rounded, because the report measures
learned codes by the same statistics as any others. Experts do not learn: how often one is used differs from batch to
batch, so that few of a batch's tokens would say anything of its codes.

Shape suffixes: S samples, L tokens of a sample, E hidden size, N out_features, K in_features.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from quantkit.algorithms.rounded import Rounded
from quantkit.algorithms.signround import Forward, Schedule, signround
from quantkit.calibration.rounding import RoundedLinear, describe, significant
from quantkit.formats.compressed_tensors import StoredLinear
from quantkit.observers import InputStats
from quantkit.recipe import LinearPlan, QuantPlan
from quantkit.schemes import IntSpec

STEPS, BATCH = 200, 8  # as in arXiv:2309.05516 section 4.1
SEED_STRIDE = 1_000_003  # no two pairs of seed and layer share an order of samples


class Start(NamedTuple):
    """A rounded linear that is yet to learn.

    weight_NK: the original's, as it came. target_NK: what the codes stand for, float32: it, or it corrected.
    stats: of its input.
    """

    linear: LinearPlan
    rounded: RoundedLinear
    weight_NK: Tensor
    target_NK: Tensor
    stats: InputStats

    @property
    def spec(self) -> IntSpec:
        """The grid of its codes."""
        spec = self.linear.quantized_to.weight
        assert isinstance(spec, IntSpec), "the recipe refuses others"
        return spec


class Samples(NamedTuple):
    """By sample, [L, E]: the layer's input, and the output it is to give. num_excluded: samples that are left out."""

    inputs: list[Tensor]
    targets: list[Tensor]
    num_excluded: int


class LearnedLayer(NamedTuple):
    """linears: by full name. note: what is said of the layer."""

    linears: dict[str, RoundedLinear]
    note: dict[str, Any]


def finite_samples(inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Samples:
    """Views of the samples of all batches [S, L, E], those with NaN or Inf left out: one would spoil every gradient."""
    found_inputs: list[Tensor] = []
    found_targets: list[Tensor] = []
    for input_SLE, target_SLE in zip(inputs, targets, strict=True):
        is_finite_S = (input_SLE.isfinite() & target_SLE.isfinite()).flatten(1).all(dim=1)
        for number in is_finite_S.nonzero().flatten().tolist():
            found_inputs.append(input_SLE[number])
            found_targets.append(target_SLE[number])
    return Samples(found_inputs, found_targets, sum(map(len, inputs)) - len(found_inputs))


def learn_layer(
    plan: QuantPlan, layer: int, starts: Sequence[Start], forward: Forward, samples: Samples
) -> LearnedLayer:
    """Codes and scales that bring the layer's outputs nearer to the samples' targets; else those of the starts.

    forward: (weights by full name of the linear, inputs [S, L, E]) -> outputs. What it draws at random depends on the
    recipe's seed and the layer alone, so that a run that is continued draws the same.
    """
    note: dict[str, Any] = {"samples": len(samples.inputs), "samples_excluded": samples.num_excluded}
    by_name = {start.linear.name: start for start in starts}
    why = "no sample is finite all through"
    if samples.inputs:
        learned = signround(
            forward,
            samples.inputs,
            samples.targets,
            {name: start.target_NK for name, start in by_name.items()},
            {name: Rounded(*start.rounded.stored[:2]) for name, start in by_name.items()},
            {name: start.spec for name, start in by_name.items()},
            schedule=Schedule(steps=STEPS, batch=BATCH, seed=SEED_STRIDE * plan.recipe.seed + layer),
        )
        note |= {"loss_start": significant(learned.loss_start), "loss": significant(learned.loss)}
        if learned.loss < learned.loss_start:
            found = learned.rounded
            return LearnedLayer({name: _described(plan, by_name[name], found[name]) for name in found}, note)
        why = "the layer's output got no better"
    return LearnedLayer({name: _kept(plan, start, why) for name, start in by_name.items()}, note)


def _described(plan: QuantPlan, start: Start, found: Rounded) -> RoundedLinear:
    before = start.rounded.stored
    changed = (found.codes_NK != before.codes_NK).float().mean().item()
    note = {"algorithm": "signround", "learned_codes": round(changed, 6)}
    return _measured(plan, start, StoredLinear(found.codes_NK, found.qparams, before.input_qparams), note)


def _kept(plan: QuantPlan, start: Start, why: str) -> RoundedLinear:
    """What the linear started from, and why it stays."""
    note = start.rounded.note
    reasons = [*([note["fallback"]] if "fallback" in note else []), f"{note['algorithm']} alone: {why}"]
    about = {"fallback": "; ".join(reasons), "learned_codes": 0.0}
    return _measured(plan, start, start.rounded.stored, about)


def _measured(plan: QuantPlan, start: Start, stored: StoredLinear, note: dict[str, Any]) -> RoundedLinear:
    weight_NK = start.weight_NK.to(start.stats.device).float()
    about = start.rounded.note | note
    return describe(plan, start.linear, stored, start.target_NK, weight_NK, start.stats, about)
