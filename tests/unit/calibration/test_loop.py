"""The loop: what each linear is rounded on, one pass and two, what is staged, and resuming."""

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from quantkit.algorithms.rtn import rtn
from quantkit.calibration import layer_learning, loop
from quantkit.calibration.loop import calibrate, staged_layer
from quantkit.calibration.tokens import CalibrationTokens, with_hash
from quantkit.errors import CalibrationError, SourceError
from quantkit.formats.checkpoint import Checkpoint, open_checkpoint
from quantkit.formats.compressed_tensors import decode_linear
from quantkit.formats.stage import Stage, layer_part
from quantkit.recipe import QuantPlan, load_recipe, make_plan
from tests.tiny_families import TEXT_FAMILIES, save_family

CPU = torch.device("cpu")
IMPORTANCE = ("algorithm=rtn", "scales=importance")
MOE = ("mixtral", "olmoe", "qwen3_moe", "qwen2_moe")


def tokens(samples: int = 6, length: int = 24) -> CalibrationTokens:
    ids = torch.randint(3, 96, (samples, length), generator=torch.Generator().manual_seed(1))
    return with_hash(ids, "random")


def planned(folder: Path, *settings: str) -> tuple[Checkpoint, QuantPlan]:
    checkpoint = open_checkpoint(folder)
    return checkpoint, make_plan(checkpoint, load_recipe("int4-all", settings), has_data=True)


def calibrated(folder: Path, out: Path, *settings: str) -> Stage:
    checkpoint, plan = planned(folder, *settings)
    out.mkdir(exist_ok=True)
    stage = Stage(out)
    calibrate(checkpoint, plan, tokens(), stage, device=CPU, on_linear=lambda *_: None)
    return stage


def staged_bytes(stage: Stage) -> dict[str, dict[str, bytes]]:
    return {
        part: {
            name: tensor.contiguous().view(torch.uint8).numpy().tobytes()
            for name, tensor in stage.read(part).items()
        }
        for part in stage.parts()
    }


@torch.no_grad()
def inputs_of(model: torch.nn.Module, name: str) -> Tensor:
    """Everything that a linear reads of the calibration tokens, [T, K]."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(tokens().ids_SL)
    handle.remove()
    return seen[0].flatten(0, -2)


def codes_agree(stage: Stage, plan: QuantPlan, name: str, weight: Tensor, x_TK: Tensor) -> float:
    """Share of the staged codes that importance-weighted rounding on this input gives."""
    linear = next(one for one in plan.linears if one.name == name)
    staged = {
        full.removeprefix(f"{name}."): tensor
        for full, tensor in stage.read(layer_part(int(name.split(".")[2]))).items()
        if full.startswith(f"{name}.")
    }
    stored = decode_linear(staged, linear.scheme)
    importance_K = x_TK.square().mean(dim=0)
    expected = rtn(
        weight, linear.scheme.weight, plan.scale_dtype, scales="importance", importance_K=importance_K
    )
    return (stored.codes_NK == expected.codes_NK).float().mean().item()


@pytest.mark.parametrize("is_whole", [True, False])
def test_each_linear_is_rounded_on_what_the_rounded_model_gives_it(tmp_path, monkeypatch, is_whole):
    """In one pass o_proj sees the rounded q, k, v; in two the layer as it was. Layers see rounded layers in both."""
    if not is_whole:
        monkeypatch.setattr(loop, "WHOLE_BYTES", 0)
        monkeypatch.setitem(loop.BATCH_BYTES, "cpu", 1)
    folder = save_family("qwen3", tmp_path / "model")
    stage = calibrated(folder, tmp_path / "out", *IMPORTANCE)
    checkpoint, plan = planned(folder, *IMPORTANCE)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rounded = [
        staged_layer(stage, layer, [one for one in plan.linears if f"layers.{layer}." in one.name]).tensors
        for layer in range(2)
    ]

    for layer in range(2):
        names = [one.name.removeprefix("model.layers.0.") for one in plan.linears[:7]]
        for name in names:
            full = f"model.layers.{layer}.{name}"
            weight = checkpoint.read(f"{full}.weight").float()
            assert codes_agree(stage, plan, full, weight, inputs_of(model, full)) > 0.999, full
            if is_whole:
                model.get_submodule(full).weight.data = rounded[layer][f"{name}.weight"]
        for name in names:
            model.get_submodule(f"model.layers.{layer}.{name}").weight.data = rounded[layer][f"{name}.weight"]


@pytest.mark.parametrize("model_type", TEXT_FAMILIES)
def test_gptq_loses_less_than_rtn_in_every_family(tmp_path, model_type):
    folder = save_family(model_type, tmp_path / "model")
    stage = calibrated(folder, tmp_path / "out")
    _, plan = planned(folder)
    notes = {name: note for part in stage.parts() for name, note in stage.notes(part)["linears"].items()}
    assert notes.keys() == {one.name for one in plan.linears if one.scheme is not None}
    assert all(note["algorithm"] == "gptq" or note["fallback"] for note in notes.values())
    assert sum(note["loss"] for note in notes.values()) < 0.9 * sum(
        note["loss_rtn"] for note in notes.values()
    )
    for part in stage.parts():
        said = stage.notes(part)
        assert said["excluded"] == 0
        assert said["linear_seconds"].keys() == said["linears"].keys()
        assert {"forward", "observe", "factorize", "scales", "round"} <= said["seconds"].keys()
        if model_type in MOE and part == layer_part(1):
            assert sum(said["experts"]["tokens"]) % tokens().ids_SL.numel() == 0


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("algorithm=[rotate,weight_correction,gptq]",),
        ("algorithm=signround",),
        ("algorithm=[weight_correction,signround]", "activations=int8"),
    ],
)
@pytest.mark.parametrize("is_whole", [True, False])
def test_resumed_at_any_layer_it_stages_the_same(tmp_path, monkeypatch, settings, is_whole):
    monkeypatch.setattr(layer_learning, "STEPS", 10)
    if not is_whole:
        monkeypatch.setattr(loop, "WHOLE_BYTES", 0)
    folder = save_family("gemma2", tmp_path / "model", num_hidden_layers=3)
    expected = staged_bytes(calibrated(folder, tmp_path / "undisturbed", *settings))
    for kept in range(3):
        stage = calibrated(folder, tmp_path / "out", *settings)
        for part in stage.parts():
            if part.isdecimal() and int(part) >= kept:
                stage.drop(part)
        times = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*.safetensors")}
        again = calibrated(folder, tmp_path / "out", *settings)
        assert staged_bytes(again) == expected
        assert all(file.stat().st_mtime_ns == time for file, time in times.items())


def test_tokens_without_finite_inputs_are_left_out_and_counted(tmp_path):
    folder = save_family("llama", tmp_path / "model")
    broken = int(tokens().ids_SL[0, -1])  # the last of its window: causal attention spreads it no further
    ids = tokens().ids_SL
    count = int((ids == broken).sum())
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.get_submodule("model.embed_tokens").weight.data[broken] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    stage = calibrated(tmp_path / "broken", tmp_path / "out")
    said = stage.notes(layer_part(0))
    assert said["excluded"] >= 4 * count  # at least: it is an input of qkv, o, gate and up, down
    assert all(torch.isfinite(tensor.float()).all() for tensor in stage.read(layer_part(1)).values())


def test_nothing_finite_is_an_error(tmp_path):
    folder = save_family("llama", tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.get_submodule("model.layers.0.input_layernorm").weight.data[:] = float("inf")
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(CalibrationError, match="finite input"):
        calibrated(tmp_path / "broken", tmp_path / "out")


def test_weights_that_are_not_finite_are_refused_unless_they_stay(tmp_path):
    folder = save_family("llama", tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.get_submodule("model.layers.1.mlp.down_proj").weight.data[2, 3] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(SourceError, match=r"layers.1.mlp.down_proj.weight has NaN"):
        calibrated(tmp_path / "broken", tmp_path / "out")
    stage = calibrated(tmp_path / "broken", tmp_path / "kept", "ignore=['*.1.mlp.down_proj']")
    assert stage.has(layer_part(1))


@pytest.mark.parametrize("model_type", ["llama", "qwen2_moe"])
def test_a_biased_linear_gets_the_mean_of_its_error_back(tmp_path, model_type):
    folder = save_family(model_type, tmp_path / "model")
    stage = calibrated(folder, tmp_path / "out", "algorithm=[gptq,bias_correction]")
    checkpoint, plan = planned(folder)
    name = "model.layers.0.self_attn.q_proj"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    x_TK = inputs_of(model, name)
    staged = staged_layer(stage, 0, [one for one in plan.linears if ".layers.0." in one.name]).tensors
    exact = model.get_submodule(name)(x_TK)
    rounded = x_TK @ staged["self_attn.q_proj.weight"].T
    plain = rounded + checkpoint.read(f"{name}.bias")
    corrected = rounded + staged["self_attn.q_proj.bias"].float()
    assert (corrected - exact).mean(dim=0).norm() < 0.05 * (plain - exact).mean(dim=0).norm()
