"""Learned rounding of a small layer: better than its start, deterministic, and never worse."""

import pytest
import torch
from torch.nn.functional import linear, silu

from quantkit.algorithms.factor import factorize
from quantkit.algorithms.gptq import gptq
from quantkit.algorithms.rounded import Rounded
from quantkit.algorithms.rtn import rtn
from quantkit.algorithms.signround import Schedule, signround
from quantkit.schemes import IntSpec, PerChannel, PerGroup
from quantkit.schemes.tiles import dequantize_weight, quantize_weight
from tests.unit.algorithms.correlated import inputs, weights

SCHEDULE = Schedule(steps=60, batch=4)
SPECS = {
    "int4 group": IntSpec(bits=4, granularity=PerGroup(32)),
    "int4 asymmetric": IntSpec(bits=4, granularity=PerGroup(32), symmetric=False),
    "int2 channel": IntSpec(bits=2, granularity=PerChannel()),
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


class Layer:
    """Two linears with a nonlinearity between, of which 32 channels go on; its inputs [12, 10, 64] and its outputs."""

    def __init__(self) -> None:
        self.weights = {"up": weights(48, 64) / 8, "down": weights(32, 32, seed=1) / 6}
        self.inputs = inputs(120, 64).view(12, 10, 64)
        self.targets = self.forward(self.weights, self.inputs)

    @staticmethod
    def forward(values, x):
        return linear(silu(linear(x, values["up"]))[..., :32], values["down"])

    def starts(self, spec, scales="mse"):
        return {name: rtn(w_NK, spec, torch.bfloat16, scales=scales) for name, w_NK in self.weights.items()}

    def loss(self, rounded, spec) -> float:
        values = {
            name: dequantize_weight(part.codes_NK, spec.granularity, part.qparams)
            for name, part in rounded.items()
        }
        return (self.forward(values, self.inputs) - self.targets).square().mean().item()

    def learn(self, starts, spec, schedule=SCHEDULE):
        specs = dict.fromkeys(self.weights, spec)
        return signround(
            self.forward, self.inputs, self.targets, self.weights, starts, specs, schedule=schedule
        )


@every_spec
def test_the_layer_gets_better_than_rtn(spec):
    layer = Layer()
    starts = layer.starts(spec)
    found = layer.learn(starts, spec)
    learned = found.rounded
    assert layer.loss(learned, spec) < 0.8 * layer.loss(starts, spec)
    assert found.loss == pytest.approx(layer.loss(learned, spec), rel=1e-4)
    for name, part in learned.items():
        assert part.codes_NK.dtype == torch.int8
        assert part.codes_NK.amin() >= spec.qmin
        assert part.codes_NK.amax() <= spec.qmax
        assert part.qparams.scale.dtype == starts[name].qparams.scale.dtype
        assert part.qparams.scale.shape == starts[name].qparams.scale.shape


@every_spec
def test_without_steps_the_start_comes_back(spec):
    layer = Layer()
    starts = layer.starts(spec)
    same = layer.learn(starts, spec, Schedule(steps=0)).rounded
    for name, part in starts.items():
        assert torch.equal(same[name].codes_NK, part.codes_NK)
        assert torch.equal(same[name].qparams.scale, part.qparams.scale)


def test_it_starts_from_the_codes_it_is_given():
    """Many of GPTQ's codes are not the nearest; they are where the learning starts, and what it improves."""
    layer, spec = Layer(), SPECS["int4 group"]
    x_TK = layer.inputs.flatten(0, 1)
    qparams = layer.starts(spec)["up"].qparams
    start = Rounded(gptq(layer.weights["up"], factorize(x_TK.T @ x_TK / 120), spec, qparams), qparams)
    nearest_NK = quantize_weight(layer.weights["up"], spec, start.qparams)
    moved_NK = start.codes_NK != nearest_NK
    assert moved_NK.float().mean() > 0.05
    starts = layer.starts(spec) | {"up": start}
    learned = layer.learn(starts, spec).rounded
    assert layer.loss(learned, spec) < layer.loss(starts, spec)
    codes_NK = learned["up"].codes_NK
    assert (codes_NK == start.codes_NK)[moved_NK].sum() > (codes_NK == nearest_NK)[moved_NK].sum()


def test_the_same_seed_gives_the_same_and_another_something_else():
    layer, spec = Layer(), SPECS["int4 group"]
    first, second, other = (
        layer.learn(layer.starts(spec), spec, Schedule(steps=20, batch=4, seed=seed)).rounded
        for seed in (0, 0, 1)
    )
    assert torch.equal(first["up"].codes_NK, second["up"].codes_NK)
    assert torch.equal(first["up"].qparams.scale, second["up"].qparams.scale)
    assert not torch.equal(first["up"].codes_NK, other["up"].codes_NK)


def test_a_start_that_cannot_be_beaten_is_kept():
    layer, spec = Layer(), SPECS["int4 group"]
    starts = layer.starts(spec)
    layer.weights = {
        name: dequantize_weight(part.codes_NK, spec.granularity, part.qparams)
        for name, part in starts.items()
    }
    layer.targets = layer.forward(layer.weights, layer.inputs)
    found = layer.learn(starts, spec)
    assert found.loss == pytest.approx(0, abs=1e-12)
    for name, part in starts.items():
        assert torch.equal(found.rounded[name].codes_NK, part.codes_NK)
