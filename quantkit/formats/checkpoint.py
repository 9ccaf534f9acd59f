"""A Hugging Face checkpoint folder: its config, and its tensors by name, wherever their shard is.

Knows files and headers; does not know which tensors are quantized (`compressed_tensors`) or what a
decoder layer is (`arch`).
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from quantkit.errors import SourceError
from quantkit.formats.safetensors_file import TensorInfo, iter_bytes, read_header, read_rows, read_tensor

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


class Checkpoint:
    """An opened folder: `config` is config.json parsed, `tensors` every tensor of every shard, sorted by name."""

    def __init__(self, path: Path, config: dict[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
        self.path = path
        self.config = config
        self.tensors = tensors

    @property
    def text_config(self) -> dict[str, Any]:
        """The language model's part of the config: `text_config` of a multimodal model, else all of it."""
        nested = self.config.get("text_config")
        return nested if isinstance(nested, dict) else self.config

    @property
    def model_type(self) -> str:
        """`model_type` of the language model."""
        return str(self.text_config.get("model_type") or self.config.get("model_type"))

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.num_bytes for info in self.tensors.values())

    def count(self, key: str) -> int:
        """A positive number in the language model's config. Raises SourceError if it is none."""
        value = self.text_config.get(key)
        if type(value) is not int or value < 1:
            raise self.mismatch(f"config.json says {key}: {value!r}, which is not a positive number")
        return value

    def mismatch(self, finding: str) -> SourceError:
        """What to raise where config.json and the weights do not belong together."""
        return SourceError(
            f"{self.path}: {finding}",
            fix="fetch the checkpoint again: it is incomplete, or not what its config.json says",
        )

    def info(self, name: str) -> TensorInfo:
        """Where the tensor lies. Raises SourceError if there is none of that name."""
        if name not in self.tensors:
            raise SourceError(
                f"{self.path}: tensor {name} is missing",
                fix="the checkpoint is incomplete or of another architecture than its config.json says: fetch it again",
            )
        return self.tensors[name]

    def read(self, name: str) -> Tensor:
        """The whole tensor, in its dtype on disk."""
        return read_tensor(self.info(name))

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the tensor."""
        return read_rows(self.info(name), start, stop)

    def content_hash(self) -> str:
        """SHA-256 over config and every tensor's name, dtype, shape and bytes; reads the whole checkpoint."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name, info in self.tensors.items():
            digest.update(f"{name}\0{info.dtype}\0{info.shape}\0".encode())
            for chunk in iter_bytes(info):
                digest.update(chunk)
        return digest.hexdigest()


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a folder with config.json and safetensors weights, single or sharded; reads headers only.

    Raises SourceError for anything missing, damaged or inconsistent, naming the file.
    """
    if not path.is_dir():
        raise SourceError(
            f"{path}: no such folder", fix="give a checkpoint folder, a hub id, a .gguf file, or `demo`"
        )
    config = _read_config(path)
    tensors: dict[str, TensorInfo] = {}
    for shard, names in _shards(path).items():
        header = read_header(path / shard)
        missing = [name for name in names or () if name not in header]
        if missing:
            raise SourceError(
                f"{path / INDEX_NAME} says that {missing[0]!a} is in {shard}, which does not hold it",
                fix="fetch the shard and the index again; they are not of one version",
            )
        doubled = tensors.keys() & header.keys()
        if doubled:
            raise SourceError(
                f"{path}: tensor {min(doubled)} is in two shards, one of them {shard}",
                fix="remove the shard that the index does not list",
            )
        tensors.update(header)
    if not tensors:
        raise SourceError(f"{path}: the weights hold no tensor at all", fix="fetch the checkpoint again")
    return Checkpoint(path, config, dict(sorted(tensors.items())))


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    if (path / "model_index.json").is_file():
        raise SourceError(f"{path}: a diffusion pipeline", fix="give a decoder-only language model")
    if not file.is_file():
        raise SourceError(
            f"{path}: no config.json", fix="give the folder that holds config.json and the weights"
        )
    config = read_json(file)
    if not isinstance(config, dict):
        raise SourceError(f"{file}: not a JSON object", fix="fetch config.json again")
    return config


def read_json(file: Path) -> Any:
    """A JSON file of a checkpoint. Raises SourceError with file, line and column if it is none."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{file}: not valid JSON ({error})", fix="fetch this file again") from None


def _shards(path: Path) -> dict[str, list[str] | None]:
    """Shard file name -> the tensors the index promises in it (None where there is no index)."""
    index = path / INDEX_NAME
    if not index.is_file():
        if (path / SINGLE_NAME).is_file():
            return {SINGLE_NAME: None}
        raise _no_weights(path)
    listed = read_json(index)
    weight_map = listed.get("weight_map") if isinstance(listed, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{index}: no weight_map", fix="fetch the index again")
    shards: dict[str, list[str] | None] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_file_name(shard):
            raise SourceError(
                f"{index}: {name!a} is said to be in {ascii(shard)[:300]}, which is not a file of this folder",
                fix="fetch the index again",
            )
        names = shards.setdefault(shard, [])
        assert names is not None, "every entry was created above"
        names.append(name)
    absent = [shard for shard in sorted(shards) if not (path / shard).is_file()]
    if absent:
        raise SourceError(
            f"{path}: {len(absent)} of {len(shards)} shards missing, first {absent[0]}",
            fix="finish the download: every shard the index names has to be there",
        )
    return dict(sorted(shards.items()))


def _is_file_name(name: str) -> bool:
    """A name a shard can have: in the folder itself, printable, and of a length that file systems take."""
    return (
        Path(name).name == name
        and name.isprintable()
        and name not in {"", ".."}
        and len(name.encode()) <= 255
    )


def _no_weights(path: Path) -> SourceError:
    strays = sorted(
        file.name
        for file in path.iterdir()
        if file.suffix in {".bin", ".pt", ".pth", ".gguf", ".safetensors"}
    )
    if any(name.endswith((".bin", ".pt", ".pth")) for name in strays):
        return SourceError(
            f"{path}: only pickled weights ({strays[0]}), which are never loaded because they can run code",
            fix="use a safetensors version of this checkpoint, or convert it where you trust it",
        )
    if any(name.endswith(".gguf") for name in strays):
        return SourceError(
            f"{path}: holds {strays[0]} but no safetensors", fix=f"name the file: {path / strays[0]}"
        )
    if strays:
        return SourceError(
            f"{path}: {strays[0]} but neither {SINGLE_NAME} nor {INDEX_NAME}",
            fix=f"fetch {INDEX_NAME}, or rename a single file to {SINGLE_NAME}",
        )
    return SourceError(f"{path}: no safetensors weights", fix="finish the download, or give another folder")
