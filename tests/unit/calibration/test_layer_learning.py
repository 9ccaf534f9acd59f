"""Learning inside the loop: every family, with and without batches, from every start; and what cannot learn."""

import pytest
import torch
import transformers

from quantkit.calibration import layer, layer_learning, loop
from quantkit.calibration.layer_learning import Samples, finite_samples
from quantkit.calibration.loop import staged_layer
from quantkit.formats.stage import layer_part
from tests.tiny_families import TEXT_FAMILIES, save_family
from tests.tiny_llama import write_tiny_llama
from tests.unit.calibration.test_loop import MOE, calibrated, planned, staged_bytes, tokens

LEARNED = ("algorithm=signround",)


@torch.no_grad()
def first_layer_error(folder, stage) -> float:
    """Mean squared error of the first layer's output, computed by transformers from what is staged."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    outputs: list[torch.Tensor] = []
    first = model.get_submodule("model.layers.0")
    first.register_forward_hook(
        lambda _, args, out: outputs.append(out[0] if isinstance(out, tuple) else out)
    )
    model(tokens().ids_SL)
    _, plan = planned(folder)
    linears = [one for one in plan.linears if ".layers.0." in one.name]
    for name, tensor in staged_layer(stage, 0, linears).tensors.items():
        first.get_parameter(name).copy_(tensor)
    model(tokens().ids_SL)
    return (outputs[1] - outputs[0]).square().mean().item()


@pytest.mark.parametrize("is_whole", [True, False])
@pytest.mark.parametrize("settings", [LEARNED, ("algorithm=signround", "symmetric=false")])
def test_what_it_says_of_the_layer_is_what_the_layer_computes(tmp_path, monkeypatch, is_whole, settings):
    if not is_whole:
        monkeypatch.setattr(loop, "WHOLE_BYTES", 0)
    folder = save_family("qwen3", tmp_path / "model")
    stage = calibrated(folder, tmp_path / "out", *settings)
    plain = calibrated(folder, tmp_path / "plain", *settings, "algorithm=rtn")
    said = stage.notes(layer_part(0))["signround"]
    error = first_layer_error(folder, stage)
    assert said["loss"] == pytest.approx(error, rel=1e-3)
    assert error < 0.7 * said["loss_start"]
    if is_whole:
        return
    assert said["loss_start"] == pytest.approx(first_layer_error(folder, plain), rel=1e-3)


@pytest.mark.parametrize("model_type", TEXT_FAMILIES)
def test_every_family_learns_all_but_its_experts(tmp_path, monkeypatch, model_type):
    monkeypatch.setattr(layer_learning, "STEPS", 40)
    folder = save_family(model_type, tmp_path / "model")
    stage = calibrated(folder, tmp_path / "out", *LEARNED)
    for part in stage.parts():
        notes = stage.notes(part)
        said = notes["signround"]
        assert said["loss"] < said["loss_start"]
        for name, note in notes["linears"].items():
            assert note["algorithm"] == ("rtn" if ".experts." in name else "signround")
        assert notes["linear_seconds"].keys() == notes["linears"].keys()
        has_experts = any(".experts." in name for name in notes["linears"])
        assert has_experts == ("experts" in said)
        assert has_experts <= (model_type in MOE)


def test_learning_from_gptq_loses_less_than_gptq(tmp_path):
    folder = write_tiny_llama(tmp_path / "model")
    errors = [
        first_layer_error(folder, calibrated(folder, tmp_path / name, f"algorithm={name}"))
        for name in ("gptq", "[gptq,signround]")
    ]
    assert errors[1] < errors[0]


def test_the_kv_cache_is_chosen_for_what_was_learned(tmp_path, monkeypatch):
    monkeypatch.setattr(layer_learning, "STEPS", 20)
    folder = save_family("llama", tmp_path / "model")
    learned, plain = (
        calibrated(folder, tmp_path / name, f"algorithm={name}", "kv_cache=fp8").notes(layer_part(0))
        for name in ("signround", "rtn")
    )
    assert learned["kv_cache"]["costs"] != plain["kv_cache"]["costs"]


def test_samples_that_are_not_finite_are_left_out():
    inputs = [torch.zeros(2, 3, 4), torch.ones(2, 3, 4)]
    targets = [x.clone() for x in inputs]
    inputs[0][0, 2, 1], targets[1][1, 0, 0] = float("nan"), float("inf")
    found = finite_samples(inputs, targets)
    assert found.num_excluded == 2
    assert [int(x[0, 0]) for x in found.inputs] == [0, 1]
    assert all(torch.equal(x, target) for x, target in zip(found.inputs, found.targets, strict=True))


def test_without_a_finite_sample_the_start_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(layer, "finite_samples", lambda *_: Samples([], [], 6))
    folder = save_family("llama", tmp_path / "model")
    stage = calibrated(folder, tmp_path / "out", *LEARNED)
    plain = calibrated(folder, tmp_path / "plain", "algorithm=rtn")
    assert staged_bytes(stage) == staged_bytes(plain)
    notes = stage.notes(layer_part(0))
    assert notes["signround"] == {"samples": 0, "samples_excluded": 6}
    for note in notes["linears"].values():
        assert (note["algorithm"], note["learned_codes"]) == ("rtn", 0)
        assert "no sample is finite" in note["fallback"]
