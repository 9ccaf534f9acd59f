"""Safetensors files, read by position: headers checked against the bytes there are, tensors through pread.

Nothing is mapped into memory: a held map counts as resident once it has been read through. Reading is
`os.preadv` straight into the tensor's own storage.
"""

import json
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantkit.errors import SourceError
from quantkit.formats.durable import write_atomically

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
_MAX_VALUE = 2**63 - 1  # of torch, for extents and their product

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


class TensorInfo(NamedTuple):
    """Where one tensor lies: bytes [begin, end) of `file`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        """Size of the tensor's data."""
        return self.end - self.begin


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, by name, in the order of their data.

    Raises SourceError if the header is not valid, claims bytes that the file does not have, or sizes that
    do not follow from dtype and shape.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        if len(head) < 8:
            raise _damaged(path, f"is {size} bytes long, too short for a safetensors header")
        (length,) = struct.unpack("<Q", head)
        if length > MAX_HEADER_BYTES or 8 + length > size:
            raise _damaged(path, f"announces a header of {length} bytes in a file of {size}")
        raw = file.read(length)
    try:
        header = json.loads(raw.decode(), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"has a header that is not valid JSON ({error})") from None
    if not isinstance(header, dict):
        raise _damaged(path, "has a header that is not a JSON object")
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "has a __metadata__ that does not map names to texts")
    infos = [
        _tensor_info(path, name, entry, 8 + length)
        for name, entry in header.items()
        if name != "__metadata__"
    ]
    infos.sort(key=lambda info: (info.begin, info.end))
    position = 8 + length
    for info in infos:
        if info.begin != position:
            raise _damaged(path, f"leaves a hole or an overlap before tensor {info.name} (byte {position})")
        position = info.end
    if position > size:
        raise _damaged(path, f"should be {position} bytes long by its header but is {size}: truncated")
    if position < size:
        raise _damaged(path, f"should be {position} bytes long by its header but is {size}")
    return {info.name: info for info in infos}


def read_metadata(path: Path) -> dict[str, str]:
    """The `__metadata__` of a safetensors file whose header `read_header` has accepted."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        metadata = json.loads(file.read(length)).get("__metadata__", {})
    return {str(key): str(value) for key, value in metadata.items()}


def read_tensor(info: TensorInfo) -> Tensor:
    """The whole tensor, in its dtype and shape on disk."""
    tensor = torch.empty(info.shape, dtype=info.dtype)
    _fill(tensor, info, info.begin)
    return tensor


def read_rows(info: TensorInfo, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of a tensor with at least one dimension."""
    row_bytes = info.num_bytes // info.shape[0] if info.shape[0] else 0
    tensor = torch.empty((stop - start, *info.shape[1:]), dtype=info.dtype)
    _fill(tensor, info, info.begin + start * row_bytes)
    return tensor


def iter_bytes(info: TensorInfo, chunk_bytes: int = 16 << 20) -> Iterator[bytes]:
    """The tensor's bytes as they lie on disk, a chunk at a time."""
    with info.file.open("rb", buffering=0) as file:
        position = info.begin
        while position < info.end:
            chunk = os.pread(file.fileno(), min(chunk_bytes, info.end - position), position)
            if not chunk:
                raise _damaged(info.file, f"ended inside tensor {info.name}")
            yield chunk
            position += len(chunk)


def check_finite(info: TensorInfo, weights: Tensor) -> None:
    """Raise SourceError if any of these weights, read from where `info` says, is NaN or infinite."""
    if not torch.isfinite(weights).all():
        kind = "NaN" if weights.isnan().any() else "infinite"
        raise SourceError(
            f"{info.file}: {info.name} has {kind} weights",
            fix="fetch the checkpoint again: it is damaged; or list the linear under `ignore`",
        )


def encode_header(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], *, metadata: Mapping[str, str] | None = None
) -> bytes:
    """Header bytes (length prefix included) for tensors laid out one after another in the given order.

    Padded with spaces to a multiple of 8 as the safetensors library does; metadata {"format": "pt"} unless
    other is given.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + tensor_bytes(dtype, shape)
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write the tensors into a file in the given order: whole, or not at all."""
    kinds = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    header = encode_header(kinds, metadata=metadata)
    write_atomically(path, header, *map(as_bytes, tensors.values()))


def tensor_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Bytes of a dense tensor."""
    count = 1
    for extent in shape:
        count *= extent
    return count * dtype.itemsize


def as_bytes(tensor: Tensor) -> memoryview:
    """The tensor's storage as bytes, without a copy where it is contiguous."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _fill(tensor: Tensor, info: TensorInfo, position: int) -> None:
    view = as_bytes(tensor)
    with info.file.open("rb", buffering=0) as file:
        done = 0
        while done < len(view):
            count = os.preadv(file.fileno(), [view[done : done + (1 << 30)]], position + done)
            if count == 0:
                raise _damaged(info.file, f"ended inside tensor {info.name}")
            done += count


def _tensor_info(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    if not name.isprintable():
        raise _damaged(path, f"has a tensor of the name {name!a}, which is not printable")
    match entry:
        case {"dtype": str(dtype_name), "shape": [*shape], "data_offsets": [begin, end]}:
            ok = all(type(value) is int and 0 <= value <= _MAX_VALUE for value in (*shape, begin, end))
        case _:
            ok = False
    if not ok or tensor_bytes(torch.float64, tuple(extent or 1 for extent in shape)) > _MAX_VALUE:
        raise _damaged(path, f"describes tensor {name} in a way that is not safetensors")
    if dtype_name not in DTYPES:
        raise SourceError(
            f"{path}: tensor {name} has dtype {dtype_name!a}, which is not supported",
            fix=f"convert the checkpoint to one of {', '.join(DTYPES)}",
        )
    dtype = DTYPES[dtype_name]
    if end - begin != tensor_bytes(dtype, tuple(shape)):
        raise _damaged(
            path, f"gives tensor {name} {end - begin} bytes, but {dtype_name} {shape} takes another number"
        )
    return TensorInfo(name, dtype, tuple(shape), path, data_start + begin, data_start + end)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    return result


def _damaged(path: Path, finding: str) -> SourceError:
    return SourceError(
        f"{path} {finding}", fix="download or copy this file again; it is damaged or incomplete"
    )
