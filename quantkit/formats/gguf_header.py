"""The header of a GGUF file, every length in it checked against the bytes there are.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from quantkit.errors import SourceError

_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9


class GgufArray(NamedTuple):
    """An array in the metadata, of which only the length is read."""

    length: int


class GgufTensor(NamedTuple):
    """One tensor: its name in the file, number of elements, and bytes [begin, end) of the file."""

    name: str
    num_elements: int
    begin: int
    end: int


class GgufHeader(NamedTuple):
    """Metadata by key, and the tensors in the order of the file."""

    metadata: Mapping[str, Any]
    tensors: list[GgufTensor]


class _DamagedError(Exception):
    """What is wrong with the file, in words that follow its name."""


def read_gguf_header(path: Path) -> GgufHeader:
    """Read and check the header; raises SourceError naming the file if it is not GGUF or damaged."""
    try:
        with path.open("rb") as file:
            return _Reader(file).header()
    except _DamagedError as error:
        raise SourceError(
            f"{path} {error}", fix="download or copy this file again; it is damaged, incomplete or not GGUF"
        ) from None


class _Reader:
    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.size = os.fstat(file.fileno()).st_size

    def header(self) -> GgufHeader:
        if self.size < 24 or self.file.read(4) != b"GGUF":
            raise _DamagedError("is not a GGUF file")
        version = self.scalar("<I")
        if version not in (2, 3):
            raise _DamagedError(f"is GGUF version {version}; versions 2 and 3 (little-endian) can be read")
        num_tensors, num_entries = self.scalar("<Q"), self.scalar("<Q")
        metadata: dict[str, Any] = {}
        for _ in range(num_entries):
            key = self.name()
            if key in metadata:
                raise _DamagedError(f"has the metadata key {key} twice")
            metadata[key] = self.value(self.scalar("<I"))
        infos = [self.tensor_info() for _ in range(num_tensors)]
        return GgufHeader(metadata, self.place(infos, metadata.get("general.alignment", 32)))

    def place(self, infos: list[tuple[str, int, int, int]], alignment: Any) -> list[GgufTensor]:
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise _DamagedError(f"says general.alignment {alignment!r}, which is no power of two")
        start = -(-self.file.tell() // alignment) * alignment
        tensors = [
            GgufTensor(name, num_elements, start + offset, start + offset + num_bytes)
            for name, num_elements, num_bytes, offset in infos
        ]
        if len({tensor.name for tensor in tensors}) != len(tensors):
            raise _DamagedError("has two tensors of one name")
        for tensor in tensors:
            if tensor.end > self.size:
                raise _DamagedError(
                    f"is {self.size} bytes long, but {tensor.name} ends at {tensor.end}: truncated"
                )
        return tensors

    def tensor_info(self) -> tuple[str, int, int, int]:
        """Name, number of elements, number of bytes, offset in the data section."""
        name = self.name()
        num_dims = self.scalar("<I")
        if num_dims > 4:
            raise _DamagedError(f"gives tensor {name} {num_dims} dimensions")
        num_elements = 1
        for _ in range(num_dims):
            num_elements *= self.scalar("<Q")
        type_id, offset = self.scalar("<I"), self.scalar("<Q")
        if type_id not in _TYPES:
            raise _DamagedError(f"stores tensor {name} as type {type_id}, which is not known")
        block_elements, block_bytes = GGML_QUANT_SIZES[_TYPES[type_id]]
        return name, num_elements, num_elements // block_elements * block_bytes, offset

    def value(self, kind: int, depth: int = 0) -> Any:
        """A metadata value; arrays are read over."""
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY or depth > 4:
            raise _DamagedError(f"has a metadata value of unknown type {kind}")
        kind, length = self.scalar("<I"), self.scalar("<Q")
        if kind in _SCALARS:
            self.read(length * struct.calcsize(_SCALARS[kind]))
        else:
            # strings and arrays take at least 8 bytes each, so this ends with the file
            for _ in range(length):
                self.value(kind, depth + 1)
        return GgufArray(length)

    def name(self) -> str:
        name = self.string()
        if not name.isprintable():
            raise _DamagedError(f"has a name in its header that is not printable: {name[:80]!r}")
        return name

    def string(self) -> str:
        try:
            return self.read(self.scalar("<Q")).decode()
        except UnicodeDecodeError:
            raise _DamagedError("has a name or text in its header that is not UTF-8") from None

    def scalar(self, layout: str) -> Any:
        return struct.unpack(layout, self.read(struct.calcsize(layout)))[0]

    def read(self, num_bytes: int) -> bytes:
        left = self.size - self.file.tell()
        if num_bytes > left:
            raise _DamagedError(f"ends inside its header ({num_bytes} bytes wanted, {left} left)")
        return self.file.read(num_bytes)


_TYPES = {kind.value: kind for kind in GGMLQuantizationType}
