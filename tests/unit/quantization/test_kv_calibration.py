"""Runs that calibrate the KV cache: what is stored where, who stays, the same bytes however often they die."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from quantkit.calibration import kv as kv_module
from quantkit.calibration.tokens import calibration_tokens
from quantkit.errors import RecipeError
from quantkit.formats.checkpoint import open_checkpoint
from quantkit.formats.kv_cache import SIDECAR_NAME, read_kv_cache
from quantkit.formats.quantization_config import read_quantization
from quantkit.quantization import dry_run, quantize_checkpoint
from quantkit.recipe import load_recipe
from quantkit.runtime.load import load_model
from quantkit.schemes import KVScheme
from quantkit.verify import verify_checkpoint
from tests.tiny_llama import HEADS, KV_HEADS, LAYERS, tiny_tensors, write_tiny_llama

SMALL = ("calibration.samples=6", "calibration.length=16")
INT8 = KVScheme(dtype="int8", granularity="head")
HEAD_DIM = 32 // HEADS


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n\n".join(f"The {word} fox jumps over {word} dogs." for word in map(str, range(40))))
    return str(file)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("source") / "model")


def quantize(source, folder, text, recipe, *settings):
    quantize_checkpoint(source, load_recipe(recipe, [*SMALL, *settings]), folder, calib=text)
    return folder


@pytest.fixture(scope="module")
def ids(source, text) -> torch.Tensor:
    """Forty tokens of the calibration text."""
    return calibration_tokens(source, text, 1, 40).ids_SL[0]


def write_suffering(folder, dtype) -> Path:
    """A model whose second layer has keys with one channel far above the others.

    INT8 loses the others in its steps, which shows where the large one hardly turns with the position, so that all
    tokens have it in common; FP8 loses where in its turn the large one is.
    """
    biases = {
        f"model.layers.{layer}.self_attn.{part}_proj.bias": torch.zeros(32 if part in "qo" else 16)
        for layer in range(LAYERS)
        for part in "qkvo"
    }
    channel = {"int8": HEAD_DIM // 2 - 1, "fp8": 0}[dtype]
    biases["model.layers.1.self_attn.k_proj.bias"][channel::HEAD_DIM] = 300.0
    tensors = tiny_tensors() | {name: bias.bfloat16() for name, bias in biases.items()}
    return write_tiny_llama(folder, tensors, attention_bias=True)


def cache_notes(folder):
    return json.loads((folder / "quantkit.json").read_text())["observed"]["kv_cache"]


def logits(folder, ids):
    return load_model(folder, dtype=torch.float32).logits(ids)


def transformers_logits(folder, ids):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(ids[None]).logits[0]


def content(folder):
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "quantkit.log.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_int8_scales_go_to_the_sidecar_and_the_weights_stay(source, tmp_path, text, ids):
    folder = quantize(source, tmp_path / "out", text, "kv-int8")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.tensors.keys() == open_checkpoint(source).tensors.keys()
    assert read_quantization(checkpoint.config).kv is None
    stored = read_kv_cache(checkpoint)
    assert stored is not None and stored.scheme == INT8 and not stored.kept_layers
    assert stored.scales.keys() == set(range(LAYERS))
    assert all(scale.shape == (KV_HEADS, 1, 1) for pair in stored.scales.values() for scale in pair)
    assert verify_checkpoint(folder).findings == ()
    for layer, note in enumerate(cache_notes(folder).values()):
        assert note["stored"] == "int8" and 0 < note["costs"]["int8"] < note["costs"]["fp8"] < 0.02
        assert note["k_scale"] == stored.scales[layer][0].flatten().tolist()
    error = (logits(folder, ids) - logits(source, ids)).norm() / logits(source, ids).norm()
    assert 1e-5 < error < 0.05


def test_fp8_scales_go_to_the_shards_and_transformers_reads_them(source, tmp_path, text, ids):
    folder = quantize(source, tmp_path / "out", text, "kv-fp8", "kv_granularity=head")
    checkpoint = open_checkpoint(folder)
    assert read_quantization(checkpoint.config).kv == KVScheme(dtype="fp8", granularity="head")
    assert not (folder / SIDECAR_NAME).exists() and verify_checkpoint(folder).findings == ()
    stored = read_kv_cache(checkpoint)
    notes = list(cache_notes(folder).values())
    assert stored is not None
    for layer, pair in stored.scales.items():
        assert [scale.flatten().tolist() for scale in pair] == [
            notes[layer][f"{part}_scale"] for part in "kv"
        ]
    theirs = transformers_logits(folder, ids)
    ours = logits(folder, ids)
    assert (ours - theirs).norm() / theirs.norm() < 1e-4
    assert (ours - logits(source, ids)).norm() / theirs.norm() > 1e-4


def test_without_text_fp8_has_scale_one_and_int8_per_head_takes_docs(source, tmp_path):
    quantize_checkpoint(source, load_recipe("kv-fp8"), tmp_path / "out")
    stored = read_kv_cache(open_checkpoint(tmp_path / "out"))
    assert stored is not None and all((scale == 1).all() for pair in stored.scales.values() for scale in pair)
    plan = dry_run(source, load_recipe("kv-int8", SMALL))
    assert plan.calibration is not None and plan.calibration.text == "docs"


def test_text_that_a_cache_cannot_use_is_refused(source, tmp_path, text):
    with pytest.raises(RecipeError, match="no effect"):
        quantize(source, tmp_path, text, "kv-int8", "kv_granularity=token", "scales=mse")


def test_a_run_with_text_that_nothing_was_chosen_by_ends(source, tmp_path, text):
    folder = quantize(source, tmp_path / "out", text, "kv-int8", "kv_granularity=token")
    assert json.loads((folder / "quantkit.json").read_text())["observed"] == {}
    assert verify_checkpoint(folder).findings == ()


@pytest.mark.parametrize("settings", [("kv-int8",), ("kv-fp8",), ("kv-fp8", "kv_granularity=head")])
def test_a_layer_that_suffers_stays_in_16_bits(tmp_path, text, ids, settings):
    suffering = write_suffering(tmp_path / "model", settings[0].removeprefix("kv-"))
    folder = quantize(suffering, tmp_path / "out", text, *settings)
    assert read_quantization(open_checkpoint(folder).config).kv is None, "config.json cannot say it"
    stored = read_kv_cache(open_checkpoint(folder))
    assert stored is not None and stored.kept_layers == {1}
    note = cache_notes(folder)["00001"]
    assert note["stored"] == "16 bits" and "of the attention's output" in note["reason"]
    report = verify_checkpoint(folder)
    assert report.findings == ()
    assert report.kv_cache is not None and report.kv_cache.endswith("16 bits in layer 1")
    vllm = next(verdict for verdict in report.loaders if verdict.loader == "vLLM")
    assert any("--kv-cache-dtype-skip-layers 1" in reason.text for reason in vllm.reasons)
    model = load_model(folder, dtype=torch.float32)
    assert [layer.dtype.itemsize for layer in model.kv.layers[:2]] == [1, 4]
    exact = logits(suffering, ids)
    error = (model.logits(ids) - exact).norm()
    coded = model.kv.layers[0]._replace(scales=stored.scales[1])
    model.kv = model.kv._replace(layers=(model.kv.layers[0], coded, *model.kv.layers[2:]))
    assert 0 < error < (model.logits(ids) - exact).norm()
    plain = transformers_logits(folder, ids)
    assert (plain - exact).norm() < 0.1 * error, "transformers keeps all of it in 16 bits"


class Killed(BaseException):
    """What a kill looks like from inside."""


@pytest.mark.parametrize(
    "settings",
    [
        ("kv-int8",),
        ("int4-all", "kv_cache=fp8"),
        ("fp8-all", "kv_cache=int8", "kv_granularity=head"),
        ("int8-static", "kv_cache=fp8"),
    ],
)
def test_killed_after_any_layer_it_continues_to_the_same_bytes(source, tmp_path, text, monkeypatch, settings):
    monkeypatch.setattr("quantkit.calibration.loop.WHOLE_BYTES", 0)
    expected = content(quantize(source, tmp_path / "undisturbed", text, *settings))
    from quantkit.formats.stage import Stage

    write = Stage.write
    staged = []

    def die(self, part, tensors, notes):
        write(self, part, tensors, notes)
        staged.append(part)
        raise Killed

    monkeypatch.setattr(Stage, "write", die)
    for _ in range(LAYERS):
        with pytest.raises(Killed):
            quantize(source, tmp_path / "killed", text, *settings)
    assert staged == ["00000", "00001"]
    assert content(quantize(source, tmp_path / "killed", text, *settings)) == expected


def test_later_layers_see_what_comes_back_from_the_cache(source, tmp_path, text, monkeypatch):
    """With a cache so coarse that it shows, the second layer has other scales."""
    plain = cache_notes(quantize(source, tmp_path / "fine", text, "kv-int8"))
    monkeypatch.setattr("quantkit.algorithms.kv_scales.INT8_SHARES", (8.0,))
    monkeypatch.setattr(kv_module, "MAX_COST", 1.0)
    coarse = cache_notes(quantize(source, tmp_path / "coarse", text, "kv-int8"))
    exact = [8 * scale for scale in plain["00001"]["k_scale"]]
    first = [8 * scale for scale in plain["00000"]["k_scale"]]
    assert coarse["00000"]["k_scale"] == pytest.approx(first, rel=0.5)  # shares of amax, 0.7 to 1
    assert coarse["00001"]["k_scale"] != pytest.approx(exact, rel=1e-3)
