"""The main job on the real model, through the real command line: quantize, verify, evaluate, generate."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPES = ("fp8", "int8", "int4")  # those that eval/demo.yaml has a limit for


def quantkit(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    command = [sys.executable, "-m", "quantkit", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)


def succeed(*arguments: str | Path) -> str:
    """Standard output of a command that has to succeed."""
    done = quantkit(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The demo model, quantized by each recipe that has a gate."""
    root = tmp_path_factory.mktemp("demo")
    for recipe in RECIPES:
        little_text = ["--set", "calibration.samples=16"] if recipe == "int4" else []
        succeed("quantize", "demo", "-r", recipe, *little_text, "-o", root / recipe)
    return {recipe: root / recipe for recipe in RECIPES}


def test_every_folder_is_complete_and_exact(folders):
    for folder in folders.values():
        report = json.loads(succeed("verify", folder, "--json"))
        assert report["findings"] == []
        assert report["num_compared"] == report["num_quantized"] == 90


def test_the_damage_is_within_the_gates(folders):
    report = json.loads(succeed("eval", "demo", *folders.values(), "--suite", "demo", "--json"))
    assert [gate["gate"] for gate in report["gates"]] == ["max_kl"] * len(RECIPES)
    measured = {Path(candidate["path"]).name: candidate for candidate in report["candidates"]}
    for candidate in measured.values():
        assert candidate["kl_noise_floor"] < candidate["kl_mean"]
        assert candidate["kl_ci"][0] < candidate["kl_mean"] < candidate["kl_ci"][1]
    assert measured["int4"]["kl_mean"] > measured["fp8"]["kl_mean"]
    bits = {recipe: candidate["bits_per_weight"] for recipe, candidate in measured.items()}
    assert 4 < bits["int4"] < 8 < bits["fp8"] < 16  # the attention projections stay in 16 bits
    card = (folders["int4"] / "README.md").read_text(encoding="utf-8")
    assert f"{measured['int4']['kl_mean']:.4f}" in card

    gated = quantkit("eval", "demo", folders["int4"], "--suite", "demo", "--max-kl", "0.0001")
    assert gated.returncode == 1
    assert "0.0001" in gated.stdout + gated.stderr


def test_the_originals_perplexity_is_that_of_transformers():
    import torch
    from transformers import AutoModelForCausalLM

    from quantkit.formats.source import resolve_source
    from quantkit.text import load_documents
    from quantkit.tokens import load_tokenizer, read_windows, tokenize

    report = json.loads(
        succeed("eval", "demo", "demo", "--windows", "3", "--length", "300", "--device", "cpu", "--json")
    )
    path = resolve_source("demo")
    with tokenize(load_documents("docs"), load_tokenizer(path)) as ids:
        ids_BT = torch.stack(list(read_windows(ids, 3, 300)))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        log_probs = model(ids_BT).logits[:, :-1].double().log_softmax(-1)
    ppl = log_probs.gather(-1, ids_BT[:, 1:, None]).mean().neg().exp().item()
    assert abs(report["reference"]["ppl"] / ppl - 1) < 1e-5
    assert report["candidates"][0]["kl_mean"] < 5e-8


def test_the_int4_model_answers(folders):
    answer = succeed("generate", folders["int4"], "What is water made of?", "--max-tokens", "32")
    assert "hydrogen" in answer
    assert "oxygen" in answer
    assert "<|im_end|>" not in answer


def test_the_original_says_what_it_says_in_transformers():
    """Greedy tokens of the unquantized demo model are those of transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from quantkit.formats.source import resolve_source

    path = resolve_source("demo")
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    expected = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    answer = succeed("generate", "demo", question[0]["content"], "--max-tokens", "24", "--dtype", "float32")
    assert answer.strip() == expected.strip()
