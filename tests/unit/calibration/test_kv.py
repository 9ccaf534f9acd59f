"""The KV cache of a layer: costs are those of running the layer, scales earn their place, who suffers stays."""

import pytest
import torch
from torch import nn

from quantkit.calibration import kv as kv_module
from quantkit.calibration.kv import choose_kv, probe_samples, through_cache, watch_cache
from quantkit.calibration.skeleton import Skeleton, run_layer
from quantkit.errors import CalibrationError
from quantkit.formats.checkpoint import open_checkpoint
from quantkit.observers.kv import KVStats
from quantkit.schemes import KVScheme
from tests.tiny_families import TEXT_FAMILIES, save_family

CPU = torch.device("cpu")
INT8 = KVScheme(dtype="int8", granularity="head")
FP8 = KVScheme(dtype="fp8", granularity="tensor")


class Layer:
    """The first layer of a tiny model with what goes into it."""

    def __init__(self, folder, samples=6):
        checkpoint = open_checkpoint(folder)
        skeleton = Skeleton(checkpoint, CPU, torch.float32)
        ids = torch.randint(3, 96, (samples, 24), generator=torch.Generator().manual_seed(0))
        outside = {name: checkpoint.read(name) for name in skeleton.outside_names()}
        (self.hidden,), (self.call, *_) = skeleton.start(ids, outside, samples)
        self.module = skeleton.fill_layer(0, skeleton.read_layer(0))

    def choose(self, scheme):
        stats = KVStats()
        watch_cache(self.module, self.hidden, self.call, stats)
        probe = probe_samples([self.hidden])
        return choose_kv(self.module, probe, self.call, stats, scheme, torch.bfloat16), probe

    def attention_output(self, hidden, call):
        found = []
        attention = self.module.get_submodule("self_attn")
        handle = attention.register_forward_hook(lambda module, args, out: found.append(out[0]))
        run_layer(self.module, hidden, call)
        handle.remove()
        return found[0]


@pytest.mark.parametrize("model_type", TEXT_FAMILIES)
@pytest.mark.parametrize("scheme", [INT8, FP8], ids=["int8", "fp8"])
def test_the_cost_is_that_of_the_layer_run_through_its_cache(tmp_path, model_type, scheme):
    layer = Layer(save_family(model_type, tmp_path))
    chosen, probe = layer.choose(scheme)
    exact = layer.attention_output(probe, layer.call)
    stored = layer.attention_output(probe, through_cache(layer.call, chosen._replace(stays=None)))
    cost = (stored - exact).square().sum() / exact.square().sum()
    assert chosen.costs[scheme.dtype] == pytest.approx(cost.item(), rel=1e-4)
    assert chosen.costs["int8"] < chosen.costs["fp8"], (
        "8 bits between largest values, against 4 of each value"
    )
    assert chosen.scales is not None
    assert {tuple(scale.shape) for scale in chosen.scales} == {
        (1,) if scheme is FP8 else (len(chosen.scales[0]), 1, 1)
    }


@pytest.mark.parametrize("scheme", [INT8, FP8], ids=["int8", "fp8"])
def test_chosen_scales_cost_no_more_than_the_usual_ones(tmp_path, scheme):
    layer = Layer(save_family("qwen3", tmp_path))
    chosen, _ = layer.choose(scheme)
    other = layer.choose(FP8 if scheme is INT8 else INT8)[0]
    usual = other.costs[scheme.dtype]  # of the format that was not asked for
    assert chosen.costs[scheme.dtype] <= usual


def test_small_values_earn_a_scale_of_their_own(tmp_path):
    """e4m3 has no fine steps below 2^-6: values that are all smaller need a scale."""
    layer = Layer(save_family("llama", tmp_path))
    for name in ("v_proj", "k_proj"):
        for parameter in layer.module.get_submodule(f"self_attn.{name}").parameters():
            parameter.data *= 1e-3
    chosen, _ = layer.choose(FP8)
    assert chosen.scales is not None
    assert chosen.scales[1].item() < 2**-6
    assert chosen.costs["fp8"] < 0.1 * layer.choose(INT8)[0].costs["fp8"]


def test_a_layer_that_suffers_stays_and_computes_as_before(tmp_path, monkeypatch):
    layer = Layer(save_family("llama", tmp_path))
    monkeypatch.setattr(kv_module, "MAX_COST", 1e-9)
    chosen, _ = layer.choose(INT8)
    assert chosen.stays is not None and "int8 costs" in chosen.stays
    assert chosen.note["stored"] == "16 bits" and chosen.note["reason"] == chosen.stays
    assert through_cache(layer.call, chosen) is layer.call
    monkeypatch.setattr(kv_module, "MAX_COST", 1.0)
    chosen, _ = layer.choose(INT8)
    assert chosen.stays is None and chosen.note["stored"] == "int8"
    through = run_layer(layer.module, layer.hidden, through_cache(layer.call, chosen))
    assert not torch.equal(through, run_layer(layer.module, layer.hidden, layer.call))


def test_a_sliding_window_is_measured_as_it_slides(tmp_path):
    layer = Layer(save_family("mistral", tmp_path, sliding_window=4))
    chosen, probe = layer.choose(INT8)
    exact = layer.attention_output(probe, layer.call)
    stored = layer.attention_output(probe, through_cache(layer.call, chosen))
    wide = Layer(save_family("mistral", tmp_path / "wide", sliding_window=None))
    assert not torch.allclose(exact, wide.attention_output(probe, wide.call))
    cost = (stored - exact).square().sum() / exact.square().sum()
    assert chosen.costs["int8"] == pytest.approx(cost.item(), rel=1e-4)


def test_samples_that_are_not_finite_do_not_decide(tmp_path):
    layer = Layer(save_family("llama", tmp_path), samples=3)
    layer.hidden[1] = float("nan")
    with_nan, _ = layer.choose(INT8)
    layer.hidden = layer.hidden[[0, 2]]
    assert layer.choose(INT8)[0].costs == pytest.approx(with_nan.costs)
    layer.hidden[:, 0] = float("inf")
    with pytest.raises(CalibrationError, match="finite"):
        layer.choose(INT8)


def test_choosing_leaves_no_hook_behind(tmp_path):
    layer = Layer(save_family("llama", tmp_path))
    layer.choose(INT8)
    assert all(
        not module._forward_pre_hooks for module in layer.module.modules() if isinstance(module, nn.Module)
    )


@pytest.mark.parametrize("batches", [[10], [3, 3, 4], [1, 9], [2], [1, 1, 1, 1, 1]])
def test_probes_are_spread_evenly_over_all_batches(batches):
    total = sum(batches)
    hidden = torch.arange(total).view(-1, 1, 1).float()
    found = probe_samples(list(torch.split(hidden, batches))).flatten().tolist()
    count = min(kv_module.PROBE_SAMPLES, total)
    assert found == [index * total // count for index in range(count)]
