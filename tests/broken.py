"""Ways to damage a checkpoint folder, a safetensors file or a recipe, for tests of what is said about it.

Each function returns one that takes the test's folder, which holds the good checkpoint `model`.
"""

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Break = Callable[[Path], None]
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"


def nothing(folder: Path) -> None:
    """The model is fine; the command is not."""


def config(**changes: Any) -> Break:
    """Change keys of config.json; None removes one."""

    def apply(folder: Path) -> None:
        file = folder / "model" / "config.json"
        content = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return apply


def text(name: str, content: str | bytes) -> Break:
    """Write a file (path below the test's folder)."""

    def apply(folder: Path) -> None:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())

    return apply


def removed(name: str) -> Break:
    """Remove a file."""
    return lambda folder: (folder / name).unlink()


def cut(name: str, num_bytes: int) -> Break:
    """Drop the last bytes of a file."""

    def apply(folder: Path) -> None:
        file = folder / name
        file.write_bytes(file.read_bytes()[:-num_bytes])

    return apply


def tensor(name: str, change: Callable[[Tensor], Tensor | None]) -> Break:
    """Replace a tensor by what `change` makes of it; None removes it."""

    def apply(folder: Path) -> None:
        file = folder / "model" / WEIGHTS
        tensors = load_file(file)
        changed = change(tensors.pop(name))
        save_file(tensors | ({} if changed is None else {name: changed}), file, metadata={"format": "pt"})

    return apply


def with_value(name: str, value: float) -> Break:
    """Put one value into the middle of a tensor."""

    def change(weight: Tensor) -> Tensor:
        weight[weight.shape[0] // 2, 3] = value
        return weight

    return tensor(name, change)


def header(change: Callable[[dict[str, Any]], object]) -> Break:
    """Change the safetensors header; `change` edits it in place or returns another (bytes are taken as they are)."""

    def apply(folder: Path) -> None:
        file = folder / "model" / WEIGHTS
        raw = file.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        content = json.loads(raw[8 : 8 + length])
        changed = change(content)
        if not isinstance(changed, bytes):
            changed = json.dumps(content if changed is None else changed).encode()
        file.write_bytes(struct.pack("<Q", len(changed)) + changed + raw[8 + length :])

    return apply


def entry(name: str = UP, **fields: Any) -> Break:
    """Change one tensor's entry in the header."""

    def change(content: dict[str, Any]) -> None:
        content[name] |= fields

    return header(change)


def shards(edit: Callable[[Path, dict[str, str]], None] = lambda model, weight_map: None) -> Break:
    """Split the weights in two shards with an index; `edit` may change files and weight_map."""

    def apply(folder: Path) -> None:
        model = folder / "model"
        tensors = load_file(model / WEIGHTS)
        (model / WEIGHTS).unlink()
        names = sorted(tensors)
        halves = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
        for shard, members in halves.items():
            save_file({name: tensors[name] for name in members}, model / shard, metadata={"format": "pt"})
        weight_map = {name: shard for shard, members in halves.items() for name in members}
        edit(model, weight_map)
        (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    return apply


def missing_shard(model: Path, weight_map: dict[str, str]) -> None:
    """An interrupted download: the index is there, a shard is not."""
    (model / "b.safetensors").unlink()


def cut_shard(model: Path, weight_map: dict[str, str]) -> None:
    """An interrupted download: the last shard is shorter than its header says."""
    file = model / "b.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def outside(model: Path, weight_map: dict[str, str]) -> None:
    """The index names a file of another folder."""
    weight_map[UP] = "../../secrets.safetensors"


def moved(model: Path, weight_map: dict[str, str]) -> None:
    """The index says that a tensor is in the shard which does not hold it."""
    weight_map[UP] = "a.safetensors"


def doubled(model: Path, weight_map: dict[str, str]) -> None:
    """A tensor is in both shards."""
    tensors = load_file(model / "a.safetensors")
    save_file(tensors | {UP: torch.zeros(64, 32)}, model / "a.safetensors", metadata={"format": "pt"})


def quantized(section: Mapping[str, Any]) -> Break:
    """Say in config.json that the checkpoint is quantized."""
    return config(quantization_config=dict(section))


def experts(**changes: Any) -> Break:
    """Make the model a Qwen3-MoE of four experts a layer, and change keys of its config.json."""

    def apply(folder: Path) -> None:
        file = folder / "model" / WEIGHTS
        tensors = load_file(file)
        for name in [name for name in tensors if ".mlp." in name]:
            parent, _, rest = name.partition(".mlp.")
            tensors |= {f"{parent}.mlp.experts.{number}.{rest}": tensors[name].clone() for number in range(4)}
            tensors[f"{parent}.mlp.gate.weight"] = torch.zeros(4, 32, dtype=torch.bfloat16)
            del tensors[name]
        save_file(tensors, file, metadata={"format": "pt"})
        config(model_type="qwen3_moe", architectures=["Qwen3MoeForCausalLM"], **changes)(folder)

    return apply
