"""A run on text that the model writes itself, and on conversations: what it says, what its dry run says."""

import json

import pytest

from quantkit.calibration import self_text
from quantkit.quantization import dry_run, quantize_checkpoint
from quantkit.recipe import load_recipe
from tests.tiny_llama import write_tiny_llama

SMALL = ("calibration.samples=4", "calibration.length=16")


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))
    return write_tiny_llama(tmp_path / "model")


def record(source, folder, calib, *settings):
    said = []
    recipe = load_recipe("int4-all", [*SMALL, *settings])
    quantize_checkpoint(source, recipe, folder, calib=calib, announce=said.append)
    return json.loads((folder / "quantkit.json").read_text())["calibration"], said


def test_a_run_on_the_models_own_text(source, tmp_path, monkeypatch):
    first, _ = record(source, tmp_path / "a", "self")
    assert (first["text"], first["samples"], first["length"]) == ("self", 4, 16)
    other, _ = record(source, tmp_path / "b", "self", "seed=1")
    assert other["tokens_sha256"] != first["tokens_sha256"]
    monkeypatch.setattr(self_text, "write_text", None)  # it is in the cache
    again, _ = record(source, tmp_path / "c", "self")
    assert again == first
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[2] != weights[1]


def test_its_dry_run_writes_no_text_and_says_what_holds_the_model(source, tmp_path):
    recipe = load_recipe("int4-all", SMALL)
    before = dry_run(source, recipe, calib="self")
    assert before.calibration is not None and before.calibration.holds_model == ("self",)
    assert not (tmp_path / "cache").exists()
    quantize_checkpoint(source, recipe, tmp_path / "out", calib="self")
    after = dry_run(source, recipe, calib="self")
    assert after.calibration is not None and after.calibration.holds_model == ()
    assert len(after.calibration.tokens_sha256) == 64 != len(before.calibration.tokens_sha256)


def test_what_became_of_roles_is_said_and_kept(source, tmp_path):
    file = tmp_path / "chats.jsonl"
    chat = {"messages": [{"role": "user", "content": "why would a dog mind the lazy fox?"}]}
    file.write_text((json.dumps(chat) + "\n") * 20)
    without, said = record(source, tmp_path / "a", str(file))
    assert "no chat template" in without["roles"] and any("no chat template" in line for line in said)
    (source / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    )
    with_template, _ = record(source, tmp_path / "b", str(file))
    assert with_template["roles"] == "by the model's chat template"
    assert with_template["tokens_sha256"] != without["tokens_sha256"]
