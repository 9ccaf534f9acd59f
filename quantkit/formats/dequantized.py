"""A checkpoint whose linears are packed in a layout of another tool, read as if it held their weights.

What a layout looks like on disk is `gptq`'s and `awq`'s business; here its linears become ordinary tensors
`<module>.weight`, float32, and what they are packed in disappears, as does the quantization_config.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from quantkit.errors import SourceError
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.safetensors_file import TensorInfo

CHUNK_WEIGHTS = 1 << 22  # dequantized at a time
PACKED = "qweight"
SUFFIXES = (PACKED, "qzeros", "scales", "g_idx")

Read = Callable[[str], Tensor]  # a stored tensor by name, on whichever device


class PackedWeights(Protocol):
    """One linear [N, K] as its layout holds it, read."""

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the weight, float32 [stop − start, K]."""
        ...


class PackedLayout(Protocol):
    """How a tool packs linears; raises SourceError for tensors that do not fit together."""

    def shape(self, module: str) -> tuple[int, int]:
        """[N, K] of a packed linear, from headers."""
        ...

    def open(self, module: str, read: Read) -> PackedWeights:
        """Read what one linear is packed in."""
        ...


class DequantizedCheckpoint(Checkpoint):
    """`stored` is what is on disk; `tensors` are those of the same model in 16 bits, packed weights as float32."""

    def __init__(self, stored: Checkpoint, layout: PackedLayout) -> None:
        self.stored = stored
        self.layout = layout
        packed = [name.rpartition(".")[0] for name in stored.tensors if name.endswith(f".{PACKED}")]
        if not packed:
            raise stored.mismatch(f"quantized by its config.json, but no tensor is called .{PACKED}")
        self.modules = {f"{module}.weight": module for module in packed}
        parts = {f"{module}.{suffix}" for module in packed for suffix in SUFFIXES}
        tensors = {name: info for name, info in stored.tensors.items() if name not in parts}
        tensors |= {name: self._info(name, module) for name, module in self.modules.items()}
        super().__init__(stored.path, _unquantized(stored.config), dict(sorted(tensors.items())))

    @property
    def num_bytes(self) -> int:
        """Bytes of what is stored."""
        return self.stored.num_bytes

    def read(self, name: str) -> Tensor:
        """The whole tensor: a packed weight as float32, another in its dtype on disk."""
        return self.dequantized(name, self.stored.read) if name in self.modules else self.stored.read(name)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the tensor; a linear's packed form is read whole."""
        if name not in self.modules:
            return self.stored.read_rows(name, start, stop)
        return self.layout.open(self.modules[name], self.stored.read).rows(start, stop)

    def dequantized(self, name: str, read: Read) -> Tensor:
        """A packed weight as float32 [N, K], from what `read` gives, where that lies; some rows at a time."""
        num_rows, num_cols = self.info(name).shape
        packed = self.layout.open(self.modules[name], read)
        step = max(1, CHUNK_WEIGHTS // num_cols)
        weight_NK: Tensor | None = None
        for start in range(0, num_rows, step):
            rows = packed.rows(start, min(start + step, num_rows))
            if weight_NK is None:
                weight_NK = torch.empty(num_rows, num_cols, dtype=torch.float32, device=rows.device)
            weight_NK[start : start + step] = rows
        assert weight_NK is not None, "a linear has rows"
        return weight_NK

    def content_hash(self) -> str:
        """Of what is stored."""
        return self.stored.content_hash()

    def _info(self, name: str, module: str) -> TensorInfo:
        """Of the tensor that is not there; its bytes would begin at 0."""
        num_rows, num_cols = self.layout.shape(module)
        file = self.stored.info(f"{module}.{PACKED}").file
        return TensorInfo(name, torch.float32, (num_rows, num_cols), file, 0, 4 * num_rows * num_cols)


def stored_checkpoint(checkpoint: Checkpoint) -> Checkpoint:
    """What of a checkpoint is on disk."""
    return checkpoint.stored if isinstance(checkpoint, DequantizedCheckpoint) else checkpoint


def read_section(checkpoint: Checkpoint, allowed: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """The quantization_config: `group_size`, and each key of `allowed`, which is its first value where it is absent.

    Raises SourceError for a value that is not implemented.
    """
    section = checkpoint.config.get("quantization_config") or checkpoint.text_config["quantization_config"]
    values = {key: section.get(key, choices[0]) for key, choices in allowed.items()}
    group_size = section.get("group_size")
    wrong = next((key for key, choices in allowed.items() if values[key] not in choices), None)
    if type(group_size) is not int or (group_size < 1 and group_size != -1):
        wrong, values["group_size"] = "group_size", group_size
    if wrong is not None:
        raise SourceError(
            f"{checkpoint.path / 'config.json'}: quantization_config: {wrong} {values[wrong]!r} is not supported",
            fix="evaluate another version of this checkpoint",
        )
    return {**values, "group_size": group_size}


def packed_words(checkpoint: Checkpoint, module: str) -> tuple[int, int]:
    """The shape of a linear's qweight. Raises SourceError if it does not hold words."""
    info = checkpoint.info(f"{module}.{PACKED}")
    if info.dtype != torch.int32 or len(info.shape) != 2 or 0 in info.shape:
        raise checkpoint.mismatch(f"{info.name} is {info.dtype} {list(info.shape)}, not int32 words")
    return info.shape[0], info.shape[1]


def check_parts(checkpoint: Checkpoint, module: str, num_groups: int, num_rows: int, num_words: int) -> None:
    """Raise SourceError, from headers, unless zero points [G, words] and scales [G, N] are what they have to be."""
    for suffix, dtypes, shape in (
        ("qzeros", (torch.int32,), (num_groups, num_words)),
        ("scales", (torch.float16, torch.bfloat16, torch.float32), (num_groups, num_rows)),
    ):
        info = checkpoint.info(f"{module}.{suffix}")
        if info.dtype not in dtypes or info.shape != shape:
            raise checkpoint.mismatch(f"{info.name} is {info.dtype} {list(info.shape)}, not {list(shape)}")


def _unquantized(config: Mapping[str, Any]) -> dict[str, Any]:
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    if isinstance(plain.get("text_config"), dict):
        plain["text_config"] = _unquantized(plain["text_config"])
    return plain
