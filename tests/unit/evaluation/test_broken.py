"""Candidates that are broken: each of several gets its verdict, the others their figures; the only one is an error."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.cli.main import run
from quantkit.errors import QuantkitError
from quantkit.evaluation import evaluate
from quantkit.evaluation.cache import TensorCache
from tests.tiny_llama import CONFIG, VOCAB_SIZE, tiny_tensors, write_tiny_llama, write_tokenizer

UP = "model.layers.1.mlp.up_proj.weight"


def config(**keys):
    return lambda folder: (folder / "config.json").write_text(json.dumps(CONFIG | keys))


def quantized(**section):
    return config(quantization_config=section)


def without_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors[UP]
    save_file(tensors, folder / "model.safetensors")


def truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def swapped_tokens(folder):
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["~"], vocabulary["}"] = vocabulary["}"], vocabulary["~"]
    file.write_text(json.dumps(content))


BROKEN = {
    "vocabulary": (config(vocab_size=VOCAB_SIZE + 8), f"a vocabulary of {VOCAB_SIZE} tokens"),
    "other-ids": (swapped_tokens, "differ: token"),
    "other-merges": (lambda folder: write_tokenizer(folder, 280), "split the same text differently"),
    "no-tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer"),
    "truncated": (truncated, "truncated"),
    "missing-tensor": (without_tensor, f"tensor {UP} is missing"),
    "short": (config(max_position_embeddings=8), "has 8 positions"),
    "unknown-method": (quantized(quant_method="mystery"), "quantized with mystery"),
    "no-method": (quantized(bits=4), "which transformers cannot run here"),
    "unpacked": (quantized(quant_method="awq", bits=4, group_size=32), "no tensor is called .qweight"),
    "no-folder": (shutil.rmtree, "no such file or folder"),
    "bnb:fp3": (None, "no such format of bitsandbytes"),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folders `original` and `fine`, one for each way to be broken, and a text."""
    root = tmp_path_factory.mktemp("broken")
    write_tiny_llama(root / "original")
    write_tiny_llama(root / "fine", tiny_tensors(1))
    for name, (damage, _) in BROKEN.items():
        if damage is not None:
            damage(write_tiny_llama(root / name))
    (root / "text.txt").write_text("The quick brown fox jumps over the lazy } dog~ Why?\n\n" * 30)
    return root


def place(world, name):
    return name if name.startswith("bnb:") else world / name


def run_python(world, *names):
    return evaluate(
        world / "original",
        [place(world, name) for name in names],
        data=str(world / "text.txt"),
        windows=2,
        length=16,
        device="cpu",
        cache=TensorCache(world / "cache", free_bytes=0),
    )


def test_each_of_several_gets_its_verdict_and_the_others_go_on(world):
    report = run_python(world, *BROKEN, "fine")
    *broken, fine = report.candidates
    assert fine.failure is None and fine.damage.kl_mean > 0
    for candidate, (name, (_, finding)) in zip(broken, BROKEN.items(), strict=True):
        assert candidate.path == str(place(world, name))
        assert candidate.damage is None and finding in candidate.failure, name
        assert sum(candidate.failure in note for note in report.notes) == 1, name
        assert candidate.failure.startswith("cannot be evaluated: ")
    assert not report.passed


@pytest.mark.parametrize("name", BROKEN)
def test_the_only_candidate_is_an_error(world, name):
    with pytest.raises(QuantkitError) as caught:
        run_python(world, name)
    assert BROKEN[name][1] in caught.value.problem and caught.value.fix


@pytest.mark.parametrize("name", ["no-folder", "no-tokenizer", "truncated", "missing-tensor"])
def test_a_broken_reference_is_an_error(world, name):
    with pytest.raises(QuantkitError) as caught:
        evaluate(
            world / name,
            [world / "fine", world / "original"],
            data=str(world / "text.txt"),
            windows=2,
            length=16,
            cache=TensorCache(world / "other", free_bytes=0),
        )
    assert BROKEN[name][1] in caught.value.problem


def test_the_command_shows_every_verdict(world, capsys, monkeypatch):
    """Table, JSON and card; exit code 1, and 2 where nothing could be evaluated."""
    from quantkit.card import EVALUATION_END, EVALUATION_START

    monkeypatch.setenv("QUANTKIT_CACHE", str(world / "cache"))
    monkeypatch.chdir(world)
    monkeypatch.setenv("COLUMNS", "200")
    card = world / "vocabulary" / "README.md"
    card.write_text(f"# x\n{EVALUATION_START}\nNot evaluated yet\n{EVALUATION_END}\n")
    Path("vocabulary", "quantkit.json").write_text("{}")
    options = ["--data", "text.txt", "--windows", "2", "--length", "16", "--device", "cpu"]
    command = ["eval", "original", "vocabulary", "no-folder", "fine", *options]
    assert run(command) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("broken") == 2 and "no-folder cannot be evaluated: no-folder: no such" in out
    assert "**Broken**" in card.read_text() and "a vocabulary of" in card.read_text()
    assert run([*command, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    failures = [candidate["failure"] for candidate in report["candidates"]]
    assert failures[2] is None and all(failures[:2]) and not report["passed"]
    assert [candidate["bits_per_weight"] for candidate in report["candidates"]] == [None, None, 16.0]
    assert run(["eval", "original", "no-folder", *options]) == 2
    assert run(["eval", "no-folder", "original", "fine", *options]) == 2


def test_weights_that_are_not_numbers_are_found_by_transformers_too(world):
    tensors = tiny_tensors()
    tensors[UP][0, 0] = float("nan")
    write_tiny_llama(world / "nan", tensors)
    report = evaluate(
        world / "original",
        [world / "nan"],
        data=str(world / "text.txt"),
        windows=2,
        length=16,
        device="cpu",
        backend="transformers",
        cache=TensorCache(world / "cache", free_bytes=0),
    )
    assert "NaN logits" in report.candidates[0].failure
    assert torch.isnan(tensors[UP]).sum() == 1
