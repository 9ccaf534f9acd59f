"""Writing shards whose every byte's place is known before the first is written.

Names, dtypes and shapes of all output tensors follow from the plan, so headers and offsets are fixed at the
start; tensors then arrive in order and go to their place. Finished work is journalled: what the journal says
is done is on disk, so a run killed at any instant continues, and the result is the same to the byte.

    DIR/model-00001-of-00002.safetensors            finished
    DIR/model-00002-of-00002.safetensors.partial    being written
    DIR/.quantkit-progress.jsonl                    the journal; gone when the folder is complete
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Self

import torch
from torch import Tensor

from quantkit.errors import OutputError
from quantkit.formats.checkpoint import INDEX_NAME, SINGLE_NAME
from quantkit.formats.safetensors_file import as_bytes, encode_header, tensor_bytes

MAX_SHARD_BYTES = 4 << 30
JOURNAL_NAME = ".quantkit-progress.jsonl"
COMMIT_BYTES = 64 << 20
COMMIT_SECONDS = 2.0


class OutputTensor(NamedTuple):
    """One tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of its data."""
        return tensor_bytes(self.dtype, self.shape)


class _Place(NamedTuple):
    shard: int
    offset: int
    num_bytes: int


class ShardWriter:
    """Writes entries (tensors that stay together in one shard) in order, resuming where a journal ends.

    Use as a context manager. `num_done` entries are on disk already; `notes` are what was journalled with
    them. Owns DIR's shards, index and journal, and locks the journal against a second writer.
    """

    def __init__(self, folder: Path, entries: Sequence[Sequence[OutputTensor]], key: str) -> None:
        self._folder = folder
        self._entries = entries
        self._key = key
        self._shards = _split(entries)
        self._names = _shard_names(len(self._shards))
        self._places, self._headers = _lay_out(self._shards, entries)
        self._last_entry = [members[-1] for members in self._shards]
        self._pending: dict[str, Any] = {}
        self._uncommitted_bytes, self._committed_at = 0, time.monotonic()
        self._shard: int | None = None
        self._file: BinaryIO | None = None
        self.num_done = 0
        self.notes: dict[str, Any] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes of all shards, headers included."""
        return sum(map(len, self._headers)) + sum(place.num_bytes for place in self._places.values())

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._journal = (self._folder / JOURNAL_NAME).open("a+b", buffering=0)
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._journal.close()
            raise OutputError(
                f"{self._folder}: another process is writing here", fix="wait for it, or give another folder"
            ) from None
        try:
            self._resume()
            self._check_space()
        except BaseException:
            self._journal.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        self._journal.close()

    def write(self, name: str, data: Tensor | Iterable[bytes]) -> None:
        """Put one tensor's bytes in their place; a tensor must have the planned size."""
        place = self._places[name]
        file = self._open(place.shard)
        position = place.offset
        for chunk in [as_bytes(data)] if isinstance(data, Tensor) else data:
            assert position + len(chunk) <= place.offset + place.num_bytes, f"{name} is larger than planned"
            _pwrite_all(file.fileno(), chunk, position)
            position += len(chunk)
        assert position == place.offset + place.num_bytes, f"{name} is smaller than planned"
        self._uncommitted_bytes += place.num_bytes

    def finish_entry(self, notes: Mapping[str, Any]) -> None:
        """The next entry is complete; now and then everything complete is made durable and journalled."""
        self.num_done += 1
        self._pending |= notes
        shard_is_full = self._shard is not None and self.num_done > self._last_entry[self._shard]
        if (
            shard_is_full
            or self._uncommitted_bytes >= COMMIT_BYTES
            or time.monotonic() - self._committed_at >= COMMIT_SECONDS
        ):
            self._commit()
        if shard_is_full:
            self._close_shard()

    def finish(self) -> None:
        """All entries are done: write the index. The journal stays until `remove_journal`."""
        assert self.num_done == len(self._entries), "entries are missing"
        if len(self._names) > 1:
            weight_map = {name: self._names[place.shard] for name, place in sorted(self._places.items())}
            total = sum(place.num_bytes for place in self._places.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_atomically(self._folder / INDEX_NAME, (json.dumps(index, indent=2) + "\n").encode())

    def remove_journal(self) -> None:
        """Call when everything else of the folder is in place: it is complete from now on."""
        (self._folder / JOURNAL_NAME).unlink()
        sync_folder(self._folder)

    def _resume(self) -> None:
        self._journal.seek(0)
        lines = self._journal.read().split(b"\n")
        complete = [json.loads(line) for line in lines[:-1]]  # the last line is torn, or empty
        if not complete:
            self._journal.truncate(0)
            self._append({"key": self._key})
            return
        self._journal.truncate(sum(len(line) + 1 for line in lines[:-1]))
        if complete[0]["key"] != self._key:
            raise OutputError(
                f"{self._folder}: holds an unfinished run of another plan or source",
                fix="give the same command as before to continue it, another folder, or --overwrite to start again",
            )
        for line in complete[1:]:
            self.num_done = line["done"]
            self.notes |= line["notes"]
        for shard, last in enumerate(self._last_entry):
            if last < self.num_done and not (self._folder / self._names[shard]).exists():
                self._partial(shard).replace(self._folder / self._names[shard])

    def _check_space(self) -> None:
        written = sum(file.stat().st_blocks * 512 for file in self._folder.glob("model*.safetensors*"))
        needed = self.num_bytes - written
        free = shutil.disk_usage(self._folder).free
        if needed > free:
            raise OutputError(
                f"{self._folder}: {needed / 1e9:.2f} GB are still to be written, "
                f"but the disk has {free / 1e9:.2f} GB left",
                fix="free some space, then run the same command again: finished work is kept",
            )

    def _open(self, shard: int) -> BinaryIO:
        if self._shard != shard:
            assert self._file is None, "entries arrive in order"
            path = self._partial(shard)
            self._file = path.open("r+b" if path.exists() else "w+b", buffering=0)
            header = self._headers[shard]
            _pwrite_all(self._file.fileno(), header, 0)
            self._shard = shard
        assert self._file is not None, "opened above"
        return self._file

    def _commit(self) -> None:
        if self._file is not None:
            os.fdatasync(self._file.fileno())
        self._append({"done": self.num_done, "notes": self._pending})
        self.notes |= self._pending
        self._pending = {}
        self._uncommitted_bytes, self._committed_at = 0, time.monotonic()

    def _close_shard(self) -> None:
        assert self._file is not None and self._shard is not None, "a full shard is open"
        self._file.close()
        self._partial(self._shard).replace(self._folder / self._names[self._shard])
        sync_folder(self._folder)
        self._file = self._shard = None

    def _append(self, line: Mapping[str, Any]) -> None:
        self._journal.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
        os.fsync(self._journal.fileno())

    def _partial(self, shard: int) -> Path:
        return self._folder / f"{self._names[shard]}.partial"


def write_atomically(path: Path, data: bytes) -> None:
    """The file has its old content or all of the new, whenever the process dies."""
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def sync_folder(folder: Path) -> None:
    """Make renames and removals in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _split(entries: Sequence[Sequence[OutputTensor]]) -> list[list[int]]:
    """Entry numbers of each shard: filled in order up to MAX_SHARD_BYTES, an entry never divided."""
    shards: list[list[int]] = [[]]
    size = 0
    for number, entry in enumerate(entries):
        entry_bytes = sum(tensor.num_bytes for tensor in entry)
        if shards[-1] and size + entry_bytes > MAX_SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(number)
        size += entry_bytes
    return shards


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE_NAME]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def _lay_out(
    shards: list[list[int]], entries: Sequence[Sequence[OutputTensor]]
) -> tuple[dict[str, _Place], list[bytes]]:
    places: dict[str, _Place] = {}
    headers = []
    for shard, members in enumerate(shards):
        tensors = [tensor for number in members for tensor in entries[number]]
        headers.append(encode_header({tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}))
        offset = len(headers[-1])
        for tensor in tensors:
            places[tensor.name] = _Place(shard, offset, tensor.num_bytes)
            offset += tensor.num_bytes
    return places, headers


def _pwrite_all(descriptor: int, data: bytes | memoryview, position: int) -> None:
    view = memoryview(data)
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done : done + (1 << 30)], position + done)
