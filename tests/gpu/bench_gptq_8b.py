"""GPTQ W4A16 of every linear of a Llama-3.1-8B shape with random weights, from disk to disk. Needs a GPU.

    PYTHONPATH=.:kernels python tests/gpu/bench_gptq_8b.py FOLDER         # needs 30 GB there; the source is kept
    PYTHONPATH=.:kernels python tests/gpu/bench_gptq_8b.py FOLDER --layers 4

Prints where the seconds go, peaks of memory, and what was written.
"""

import argparse
import json
import random
import shutil
import time
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

import quantkit
from tests.tiny_llama import CONFIG

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 4096, 14336, 32, 8, 128, 128256
SAMPLES, LENGTH = 128, 2048


def linear_shapes() -> dict[str, tuple[int, int]]:
    """Out and in features of a layer's linears, by name below the layer."""
    keys = KV_HEADS * HEAD_DIM
    return {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (keys, HIDDEN),
        "self_attn.v_proj": (keys, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }


def write_source(folder: Path, num_layers: int) -> None:
    """A checkpoint with a shard per layer; weights are made on the GPU."""
    folder.mkdir(parents=True)
    weight_map: dict[str, str] = {}

    def shard(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16).mul_(0.02).cpu()

    shard("outside.safetensors", {
        "model.embed_tokens.weight": normal(VOCAB, HIDDEN),
        "lm_head.weight": normal(VOCAB, HIDDEN),
        "model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
    })  # fmt: skip
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}."
        tensors = {f"{prefix}{name}.weight": normal(*shape) for name, shape in linear_shapes().items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
        shard(f"layer-{layer:02}.safetensors", tensors)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    sizes = {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": num_layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB,
        "max_position_embeddings": 4 * LENGTH,
    }
    (folder / "config.json").write_text(json.dumps(CONFIG | sizes))


def write_words(folder: Path, text: Path) -> None:
    """A tokenizer with a word for every token, and a text that is as many tokens as are wanted."""
    tokenizer = Tokenizer(models.WordLevel({f"w{number}": number for number in range(VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    numbers = random.Random(0)
    words = (f"w{numbers.randrange(VOCAB)}" for _ in range(SAMPLES * LENGTH + LENGTH))
    text.write_text(" ".join(words), encoding="utf-8")


def seconds_by_kind(log: dict) -> Counter:
    """What the run says of itself, summed over layers."""
    total: Counter = Counter()
    for part in log["seconds_of_calibration"]["parts"].values():
        total.update(part)
    return total


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    arguments = parser.parse_args()
    source, output, text = (arguments.folder / name for name in ("source", "output", "words.txt"))
    started = time.perf_counter()
    if not source.exists():
        write_source(source, arguments.layers)
        write_words(source, text)
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}; source {time.perf_counter() - started:.1f} s"
    )
    shutil.rmtree(output, ignore_errors=True)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    settings = [
        "group_size=128",
        "algorithm=gptq",
        f"calibration.samples={SAMPLES}",
        f"calibration.length={LENGTH}",
    ]
    marks: list[tuple[str, float]] = []
    started = time.perf_counter()
    report = quantkit.quantize(
        source,
        "int4-all",
        output,
        settings=settings,
        calib=str(text),
        device="cuda",
        on_step=lambda step: marks.append((step.name, time.perf_counter() - started)),
        announce=lambda line: print(f"{time.perf_counter() - started:8.2f} s  {line}", flush=True),
    )
    elapsed = time.perf_counter() - started
    for name, at in marks:
        if name.endswith("mlp.down_proj.weight"):
            print(f"{at:8.2f} s  {name}")
    print(f"{elapsed:8.2f} s  all; {report.before_bytes / 1e9:.2f} GB -> {report.after_bytes / 1e9:.2f} GB")
    log = json.loads((output / "quantkit.log.json").read_text())
    for kind, seconds in seconds_by_kind(log).most_common():
        print(f"{seconds:8.2f} s  {kind}")
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    print(f"GPU memory: {allocated / 1e9:.2f} GB allocated at most, {reserved / 1e9:.2f} GB reserved")
    print(f"host memory: {report.peak_rss_bytes / 1e9:.2f} GB at most")


if __name__ == "__main__":
    main()
