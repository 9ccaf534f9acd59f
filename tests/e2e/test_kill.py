"""A run killed with SIGKILL at random instants, restarted each time, ends with the bytes of an undisturbed one."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from quantkit.formats.shards import OutputTensor, ShardWriter
from tests.tiny_llama import write_tokenizer

ROOT = Path(__file__).parents[2]
HIDDEN, INNER, VOCAB = 512, 2048, 4096
NORMS = ("input", "post_attention")


def write_model(folder: Path, layers: int) -> Path:
    """A random Llama whose weights take about 8.4 MB a layer."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for layer in range(layers):
        for name, rows, cols in (
            ("self_attn.q_proj", HIDDEN, HIDDEN),
            ("self_attn.k_proj", HIDDEN // 2, HIDDEN),
            ("self_attn.v_proj", HIDDEN // 2, HIDDEN),
            ("self_attn.o_proj", HIDDEN, HIDDEN),
            ("mlp.gate_proj", INNER, HIDDEN),
            ("mlp.up_proj", INNER, HIDDEN),
            ("mlp.down_proj", HIDDEN, INNER),
        ):
            shapes[f"model.layers.{layer}.{name}.weight"] = (rows, cols)
        shapes |= {f"model.layers.{layer}.{name}_layernorm.weight": (HIDDEN,) for name in NORMS}
    entries = [(OutputTensor(name, torch.bfloat16, shape),) for name, shape in shapes.items()]
    generator = torch.Generator().manual_seed(layers)
    with ShardWriter(folder, entries, "random weights") as writer:
        for (tensor,) in entries:
            writer.write(tensor.name, torch.randn(tensor.shape, generator=generator).bfloat16())
            writer.finish_entry({})
        writer.finish()
        writer.remove_journal()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": VOCAB,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text("{}")
    return folder


DATA_FREE = ("--set", "algorithm=rtn")


def start(source: Path, output: Path, options: Sequence[str] = DATA_FREE) -> subprocess.Popen[bytes]:
    """The command line in a process of its own."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    command = [sys.executable, "-m", "quantkit", "quantize", source, "-r", "int4-all", *options, "-o", output]
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, env=environment, stdout=quiet, stderr=quiet, preexec_fn=_hear_ctrl_c)


def _hear_ctrl_c() -> None:
    """A shell starts its background jobs, and with them these tests, deaf to SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def content(folder: Path) -> dict[str, bytes]:
    """All files of a result but the log, which has dates."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "quantkit.log.json"}


def kill_at_random(
    source: Path, folder: Path, kills: int, seed: int, options: Sequence[str] = DATA_FREE
) -> int:
    """Quantize undisturbed, then under so many kills; compare; returns how many kills left an unfinished folder.

    A start that ends before its kill is compared too, and its folder removed: every kill meets a process that runs.
    """
    started = time.monotonic()
    assert start(source, folder / "undisturbed", options).wait() == 0
    whole = time.monotonic() - started
    undisturbed = content(folder / "undisturbed")
    instants = random.Random(seed)
    output, landed, unfinished = folder / "killed", 0, 0
    while landed < kills:
        process = start(source, output, options)
        try:
            assert process.wait(instants.uniform(0, whole)) == 0
        except subprocess.TimeoutExpired:
            process.kill()
            landed += process.wait() == -signal.SIGKILL
            unfinished += (output / ".quantkit-progress.jsonl").exists()
            continue
        assert content(output) == undisturbed
        shutil.rmtree(output)
    assert start(source, output, options).wait() == 0
    assert content(output) == undisturbed
    return unfinished


def test_three_kills(tmp_path):
    kill_at_random(write_model(tmp_path / "source", layers=4), tmp_path, kills=3, seed=1)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_twenty_five_kills(tmp_path):
    unfinished = kill_at_random(write_model(tmp_path / "source", layers=20), tmp_path, kills=25, seed=2)
    print(f"{unfinished} of 25 kills left an unfinished folder; every result is byte-identical")
    assert unfinished >= 5


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_twenty_five_kills_of_a_calibrated_run(tmp_path):
    source = write_model(tmp_path / "source", layers=3)
    write_tokenizer(source)
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"The {word} fox jumps over {word} dogs." for word in map(str, range(400))))
    algorithms = "algorithm=[rotate,weight_correction,gptq,refine,tune]"
    settings = (
        algorithms,
        "calibration.samples=16",
        "calibration.length=64",
        "tune.epochs=1",
        "tune.batch=2",
    )
    options = ["--calib", str(text), *(part for setting in settings for part in ("--set", setting))]
    unfinished = kill_at_random(source, tmp_path, kills=25, seed=3, options=options)
    print(
        f"{unfinished} of 25 kills left an unfinished folder of a calibrated run; every result is byte-identical"
    )
    assert unfinished >= 5


def test_interrupted_from_the_keyboard_it_says_so_and_continues(tmp_path):
    source, output = write_model(tmp_path / "source", layers=24), tmp_path / "out"
    process = start(source, output)
    while not list(output.glob("model*.partial")):
        assert process.poll() is None, "ended before it wrote anything"
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert (output / ".quantkit-progress.jsonl").exists()
    assert start(source, output).wait() == 0
    assert (output / "quantkit.json").exists()
