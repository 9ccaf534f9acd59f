"""Experts of tiny random models: who is observed on what, and that the module computes with what was rounded."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.functional import linear, silu

from quantkit.algorithms.rtn import rtn
from quantkit.arch.experts import EXPERTS
from quantkit.calibration.experts import Coverage, Routed, coverage, round_experts
from quantkit.formats.checkpoint import Checkpoint, open_checkpoint
from quantkit.schemes import IntSpec, PerGroup
from quantkit.schemes.tiles import dequantize_weight
from tests.tiny_families import save_family

MOE = sorted(EXPERTS)
INT4 = IntSpec(bits=4, granularity=PerGroup(16))
PREFIX = "model.layers.1."


class Sums:
    """Rows as they came."""

    def __init__(self, num_features: int) -> None:
        self.rows = torch.zeros(0, num_features)

    def add(self, x_TK: Tensor) -> None:
        self.rows = torch.cat([self.rows, x_TK])


def to_nearest(weights: Mapping[str, Tensor], _: Sums) -> Mapping[str, Tensor]:
    return {name: nearest(weight) for name, weight in weights.items()}


def nearest(weight: Tensor) -> Tensor:
    codes, qparams = rtn(weight, INT4, torch.bfloat16)
    return dequantize_weight(codes, INT4.granularity, qparams)


def run(
    model_type: str, folder: Path, num_samples: int = 8
) -> tuple[Checkpoint, torch.nn.Module, list[Routed]]:
    """A checkpoint of the family, the module of its last layer's experts, and two calls of it."""
    save_family(model_type, folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    module = model.get_submodule(PREFIX + EXPERTS[model_type].module)
    ids = torch.randint(3, 96, (num_samples, 24), generator=torch.Generator().manual_seed(0))
    calls: list[Routed] = []
    module.register_forward_pre_hook(lambda _, args: calls.append(Routed(*args[:2])))
    with torch.no_grad():
        model(ids[: num_samples // 2])
        model(ids[num_samples // 2 :])
    return open_checkpoint(folder), module, calls


@pytest.mark.parametrize("model_type", MOE)
def test_every_token_is_observed_by_each_of_its_experts_and_no_other(tmp_path, model_type):
    _, module, calls = run(model_type, tmp_path)
    seen: dict[str, Tensor] = {}

    def watch(weights: Mapping[str, Tensor], stats: Sums) -> Mapping[str, Tensor]:
        seen.update(dict.fromkeys(weights, stats.rows))
        return weights

    names = EXPERTS[model_type]
    found = round_experts(module, names, calls, new_stats=Sums, round_linears=watch)
    hidden = torch.cat([call.hidden_TE for call in calls])
    experts = torch.cat([call.experts_TA for call in calls])
    assert len(found.starved) < 2
    assert sum(found.num_tokens) == experts.numel() == 2 * 8 * 24
    for expert, count in enumerate(found.num_tokens):
        expected = hidden[(experts == expert).any(-1)]
        assert len(expected) == count
        if expert in found.starved:
            expected = hidden
        for part in (names.gate, names.up):
            assert torch.equal(seen[names.linear(expert, part)], expected)
        assert len(seen[names.linear(expert, names.down)]) == len(expected)


@pytest.mark.parametrize("model_type", MOE)
def test_rounding_writes_what_rounding_the_tensors_on_disk_gives(tmp_path, model_type):
    checkpoint, module, calls = run(model_type, tmp_path)
    names = EXPERTS[model_type]
    round_experts(module, names, calls, new_stats=Sums, round_linears=to_nearest)
    for expert in range(4):
        on_disk = {
            part: nearest(checkpoint.read(f"{PREFIX}{names.linear(expert, part)}.weight"))
            for part in (names.gate, names.up, names.down)
        }
        gate, up = module.gate_up_proj[expert].chunk(2)
        assert torch.equal(gate, on_disk[names.gate])
        assert torch.equal(up, on_disk[names.up])
        assert torch.equal(module.down_proj[expert], on_disk[names.down])


@pytest.mark.parametrize("model_type", MOE)
def test_the_module_computes_what_its_rounded_experts_compute_one_by_one(tmp_path, model_type):
    checkpoint, module, calls = run(model_type, tmp_path)
    names = EXPERTS[model_type]
    round_experts(module, names, calls, new_stats=Sums, round_linears=to_nearest)
    hidden, experts = calls[0]
    weights = torch.rand(experts.shape, generator=torch.Generator().manual_seed(1))
    expected = torch.zeros_like(hidden, dtype=torch.float64)
    for expert in range(4):
        gate, up, down = (
            nearest(checkpoint.read(f"{PREFIX}{names.linear(expert, part)}.weight")).double()
            for part in (names.gate, names.up, names.down)
        )
        x = hidden.double()
        output = linear(silu(linear(x, gate)) * linear(x, up), down)
        expected += output * (weights * (experts == expert)).sum(-1, keepdim=True).double()
    with torch.no_grad():
        got = module.forward(hidden, experts, weights).double()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("model_type", MOE)
def test_linears_come_under_their_names_on_disk_and_observing_changes_nothing(tmp_path, model_type):
    checkpoint, module, calls = run(model_type, tmp_path)
    before = [parameter.clone() for parameter in module.parameters()]
    seen: list[str] = []

    def compare(weights: Mapping[str, Tensor], _: Sums) -> Mapping[str, Tensor]:
        for name, weight in weights.items():
            assert torch.equal(weight, checkpoint.read(f"{PREFIX}{name}.weight"))
        seen.extend(weights)
        return weights

    round_experts(module, EXPERTS[model_type], calls, new_stats=Sums, round_linears=compare)
    assert len(set(seen)) == len(seen) == 4 * 3
    assert all(map(torch.equal, before, module.parameters()))


def test_down_is_observed_behind_the_rounded_gate_and_up(tmp_path):
    _, module, calls = run("qwen3_moe", tmp_path)
    seen: dict[str, Tensor] = {}

    def zero_up(weights: Mapping[str, Tensor], stats: Sums) -> Mapping[str, Tensor]:
        seen.update(dict.fromkeys(weights, stats.rows))
        return {name: weight * (0 if "up" in name else 1) for name, weight in weights.items()}

    round_experts(module, EXPERTS["qwen3_moe"], calls, new_stats=Sums, round_linears=zero_up)
    assert all((rows == 0).all() for name, rows in seen.items() if "down" in name)


def test_a_starved_expert_sees_all_tokens_and_is_listed(tmp_path):
    _, module, calls = run("mixtral", tmp_path)
    elsewhere = [call._replace(experts_TA=call.experts_TA.clamp(min=1)) for call in calls]
    elsewhere[0].experts_TA[:2, 0] = 0  # two tokens, of the 5 that 80 features ask for
    seen: dict[str, int] = {}

    def count(weights: Mapping[str, Tensor], stats: Sums) -> Mapping[str, Tensor]:
        seen.update(dict.fromkeys(weights, len(stats.rows)))
        return weights

    names = EXPERTS["mixtral"]
    found = round_experts(module, names, elsewhere, new_stats=Sums, round_linears=count)
    assert found.starved == (0,)
    assert found.num_tokens[0] == 2
    assert [seen[names.linear(0, part)] for part in ("w1", "w3", "w2")] == [8 * 24] * 3
    assert seen[names.linear(1, "w1")] < 8 * 24


@pytest.mark.parametrize(("num_tokens", "starved"), [(3, (0, 1)), (4, (1,))])
def test_starved_is_fewer_than_a_sixteenth_of_the_features(num_tokens, starved):
    call = Routed(torch.zeros(num_tokens, 64), torch.zeros(num_tokens, 1, dtype=torch.int64))
    assert coverage([call], 2, 64) == Coverage((num_tokens, 0), starved)
