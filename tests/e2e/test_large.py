"""A checkpoint of 3B parameters goes through in less than 1.5 GB of memory."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from quantkit.formats.safetensors_file import as_bytes
from quantkit.formats.shards import OutputTensor, ShardWriter

ROOT = Path(__file__).parents[2]
# Linux counts to a process what its parent held when it was started; this parent holds next to nothing.
PEAK_KIB = """\
import os, sys
actions = [(os.POSIX_SPAWN_DUP2, 2, 1)]
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=actions)
_, status, usage = os.wait4(pid, 0)
print(usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""
HIDDEN, INNER, VOCAB, KV, LAYERS = 3072, 8192, 128256, 1024, 28


def random_bytes(shape: tuple[int, ...], generator: torch.Generator) -> Iterator[memoryview]:
    """A random bfloat16 tensor, some rows at a time."""
    for start in range(0, shape[0], 4096):
        rows = (min(4096, shape[0] - start), *shape[1:])
        yield as_bytes((0.02 * torch.randn(rows, generator=generator)).bfloat16())


def write_model(folder: Path) -> Path:
    """A random Llama of 3.2B parameters, written a tensor at a time."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for layer in range(LAYERS):
        for name, shape in (
            ("input_layernorm", (HIDDEN,)),
            ("post_attention_layernorm", (HIDDEN,)),
            ("self_attn.q_proj", (HIDDEN, HIDDEN)),
            ("self_attn.k_proj", (KV, HIDDEN)),
            ("self_attn.v_proj", (KV, HIDDEN)),
            ("self_attn.o_proj", (HIDDEN, HIDDEN)),
            ("mlp.gate_proj", (INNER, HIDDEN)),
            ("mlp.up_proj", (INNER, HIDDEN)),
            ("mlp.down_proj", (HIDDEN, INNER)),
        ):
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    entries = [(OutputTensor(name, torch.bfloat16, shape),) for name, shape in shapes.items()]
    generator = torch.Generator().manual_seed(0)
    with ShardWriter(folder, entries, "random weights") as writer:
        for (tensor,) in entries:
            writer.write(tensor.name, random_bytes(tensor.shape, generator))
            writer.finish_entry({})
        writer.finish()
        writer.remove_journal()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "vocab_size": VOCAB,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def read_and_write(source: Path, target: Path, written: int) -> float:
    """Seconds to read every byte of a folder and to write so many bytes to disk."""
    started = time.monotonic()
    piece = b""
    for file in sorted(source.glob("*.safetensors")):
        with file.open("rb", buffering=0) as opened:
            while chunk := opened.read(16 << 20):
                piece = chunk if len(chunk) == 16 << 20 else piece
    with target.open("wb", buffering=0) as opened:
        for _ in range(written // len(piece)):
            opened.write(piece)
        os.fsync(opened.fileno())
    target.unlink()
    return time.monotonic() - started


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_three_billion_parameters_in_little_memory(tmp_path):
    if shutil.disk_usage(tmp_path).free < 12e9:
        pytest.skip("needs 12 GB of free disk")
    source = write_model(tmp_path / "source")
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    command = [sys.executable, "-m", "quantkit", "quantize", source, "-r", "int4-all"]
    command += ["--set", "algorithm=rtn", "-o", tmp_path / "out"]
    started = time.monotonic()
    with (tmp_path / "log").open("wb") as log:
        outer = [sys.executable, "-c", PEAK_KIB, *map(str, command)]
        process = subprocess.run(outer, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
    seconds = time.monotonic() - started
    assert process.returncode == 0, (tmp_path / "log").read_text(encoding="utf-8")
    peak = int(process.stdout) * 1024
    before = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    after = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    bound = read_and_write(source, tmp_path / "copy", after)
    shutil.rmtree(source)
    shutil.rmtree(tmp_path / "out")
    speed = f"in {seconds:.0f} s ({seconds / before * 1e9:.1f} s/GB), peak {peak / 1e9:.2f} GB"
    share = f"reading and writing the same bytes alone {bound:.1f} s: {bound / seconds:.0%} of the time"
    print(f"{before / 1e9:.2f} GB -> {after / 1e9:.2f} GB {speed}; {share}")
    assert peak < 1.5e9
