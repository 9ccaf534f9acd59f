"""Checkpoints of the Llama-3.1-8B shape with random weights, quantized by quantkit. Needs a GPU.

    PYTHONPATH=.:kernels python tests/gpu/make_8b.py FOLDER bf16 int4-all fp8-all …      names of recipes

Two layers are made and quantized; the other thirty are copies of these, under their own names.
"""

import argparse
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

import quantkit
from tests.gpu.bench_gptq_8b import write_source, write_words

MADE, WANTED = 2, 32
LAYER = re.compile(r"\.layers\.(\d+)\.")
TEXT_SETTINGS = ["calibration.samples=8", "calibration.length=512"]


def names_in_all_layers(name: str) -> list[str]:
    """A name of layer i, for all layers that are copies of it; others stay."""
    found = LAYER.search(name)
    if found is None:
        return [name]
    layers = range(int(found[1]), WANTED, MADE)
    return [LAYER.sub(f".layers.{layer}.", name) for layer in layers]


def repeat_layers(source: Path, output: Path) -> None:
    """The same checkpoint with WANTED layers, a shard for each."""
    output.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix not in (".safetensors",) and not file.name.endswith(".index.json"):
            shutil.copy(file, output)
    shards: dict[str, dict[str, Any]] = {}
    for file in source.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            for copy in names_in_all_layers(name):
                found = LAYER.search(copy)
                shard = f"layer-{int(found[1]):02}" if found else "outside"
                if file.stem == "quantkit_kv":
                    shard = file.stem
                shards.setdefault(f"{shard}.safetensors", {})[copy] = tensor
    for shard, tensors in shards.items():
        save_file(tensors, output / shard, metadata={"format": "pt"})
    weight_map = {
        name: shard
        for shard, tensors in shards.items()
        if shard != "quantkit_kv.safetensors"
        for name in tensors
    }
    index = {"metadata": {}, "weight_map": weight_map}
    (output / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((output / "config.json").read_text())
    config["num_hidden_layers"] = WANTED
    if "quantization_config" in config:
        ignored = config["quantization_config"]["ignore"]
        config["quantization_config"]["ignore"] = [
            copy for name in ignored for copy in names_in_all_layers(name)
        ]
    (output / "config.json").write_text(json.dumps(config))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("recipes", nargs="+")
    arguments = parser.parse_args()
    source, text = arguments.folder / "two-layers", arguments.folder / "words.txt"
    if not source.exists():
        write_source(source, MADE)
        write_words(source, text)
    for name in arguments.recipes:
        started = time.perf_counter()
        small = source
        recipe, *settings = name.split(",")
        if recipe != "bf16":
            small = arguments.folder / f"{name}-two-layers"
            quantkit.quantize(
                source, recipe, small, settings=settings, calib=str(text), device="cuda", overwrite=True
            )
        repeat_layers(small, arguments.folder / name)
        print(f"{name}: {time.perf_counter() - started:.1f} s", flush=True)


if __name__ == "__main__":
    main()
