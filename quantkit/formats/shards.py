"""Writing shards whose every byte's place is known before the first is written.

Names, dtypes and shapes of all output tensors follow from the plan, so headers and offsets are fixed at the
start; tensors then arrive in order and go to their place. Finished work is journalled: what the journal says
is done is on disk, so a run killed at any instant continues, and the result is the same to the byte.

    DIR/model-00001-of-00002.safetensors            finished
    DIR/model-00002-of-00002.safetensors.partial    being written
    DIR/.quantkit-progress.jsonl                    the journal; gone when the folder is complete
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

import torch
from torch import Tensor

from quantkit.errors import OutputError
from quantkit.formats.checkpoint import INDEX_NAME, SINGLE_NAME
from quantkit.formats.durable import named, pwrite_all, sync_folder, write_atomically
from quantkit.formats.journal import JOURNAL_NAME, Journal
from quantkit.formats.safetensors_file import as_bytes, encode_header, tensor_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Tensor bytes of one shard (a larger tensor gets one for itself), and how much work a kill may cost."""

    shard_bytes: int = 4 << 30
    commit_bytes: int = 64 << 20
    commit_seconds: float = 2.0


DEFAULT_LIMITS = Limits()


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
    them. Owns DIR's shards, index and journal. key: what the output depends on; a journal with another key or
    another layout is refused. also_needed_bytes: room on the disk that is needed beside the shards. needs_index:
    write one for a single shard too.
    """

    def __init__(
        self,
        folder: Path,
        entries: Sequence[Sequence[OutputTensor]],
        key: str,
        limits: Limits = DEFAULT_LIMITS,
        *,
        also_needed_bytes: int = 0,
        needs_index: bool = False,
    ) -> None:
        self._folder = folder
        self._also_needed_bytes = also_needed_bytes
        self._needs_index = needs_index
        self._entries = entries
        self._limits = limits
        self._shards = _split(entries, limits.shard_bytes)
        self._names = _shard_names(len(self._shards))
        self._places, self._headers = _lay_out(self._shards, entries)
        self._last_entry = [members[-1] for members in self._shards]
        self._key = hashlib.sha256(b"\0".join([key.encode(), *self._headers])).hexdigest()
        self._journal = Journal(folder)
        self._pending: dict[str, Any] = {}
        self._uncommitted_bytes, self._committed_at = 0, time.monotonic()
        self._shard: int | None = None
        self._file: BinaryIO | None = None
        self._is_sound = True
        self.num_done = 0
        self.notes: dict[str, Any] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes of all shards, headers included."""
        return sum(map(len, self._headers)) + sum(place.num_bytes for place in self._places.values())

    def __enter__(self) -> Self:
        self._check_space()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._journal.__enter__()
        try:
            self._resume()
        except BaseException:
            self._journal.__exit__()
            raise
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError | KeyboardInterrupt) and self._is_sound:
            with contextlib.suppress(OSError):  # on a full disk there is often room for a line of the journal
                self._commit()
        if self._file is not None:
            self._file.close()
        self._journal.__exit__()

    def write(self, name: str, data: Tensor | Iterable[bytes]) -> None:
        """Put one tensor's bytes in their place; a tensor must have the planned size."""
        place = self._places[name]
        file = self._open(place.shard)
        position = place.offset
        for chunk in [as_bytes(data)] if isinstance(data, Tensor) else data:
            assert position + len(chunk) <= place.offset + place.num_bytes, f"{name} is larger than planned"
            with named(self._partial(place.shard)):
                pwrite_all(file.fileno(), chunk, position)
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
            or self._uncommitted_bytes >= self._limits.commit_bytes
            or time.monotonic() - self._committed_at >= self._limits.commit_seconds
        ):
            self._commit()
        if shard_is_full:
            self._close_shard()

    def finish(self) -> None:
        """All entries are done: write the index. The journal stays until `remove_journal`."""
        assert self.num_done == len(self._entries), "entries are missing"
        if len(self._names) > 1 or self._needs_index:
            weight_map = {name: self._names[place.shard] for name, place in sorted(self._places.items())}
            total = sum(place.num_bytes for place in self._places.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_atomically(self._folder / INDEX_NAME, (json.dumps(index, indent=2) + "\n").encode())

    def remove_journal(self) -> None:
        """Call when everything else of the folder is in place: it is complete from now on."""
        self._journal.remove()

    def _resume(self) -> None:
        lines = self._journal.read()
        if not lines:
            self._begin()
            return
        if lines[0].get("key") != self._key:
            raise OutputError(
                f"{self._folder}: holds an unfinished run of another plan, source or version",
                fix="give the same command as before to continue it, another folder, or --overwrite to start again",
            )
        for line in lines[1:]:
            self.num_done = line["done"]
            self.notes |= line["notes"]
        for shard in range(len(self._shards)):
            self._check_shard(shard)

    def _begin(self) -> None:
        """Start the journal of a folder that holds nothing else."""
        if any(path.name != JOURNAL_NAME for path in self._folder.iterdir()):
            self._journal.remove()
            raise OutputError(
                f"{self._folder}: another process has just written here", fix="run the same command again"
            )
        self._journal.append({"key": self._key})

    def _check_shard(self, shard: int) -> None:
        """What the journal says is in a shard has to be there; a full one gets its final name."""
        done = [number for number in self._shards[shard] if number < self.num_done]
        if not done:
            return
        final, partial = self._folder / self._names[shard], self._partial(shard)
        if done[-1] == self._last_entry[shard] and not final.exists() and partial.exists():
            partial.replace(final)
        file = final if done[-1] == self._last_entry[shard] else partial
        last = self._places[self._entries[done[-1]][-1].name]
        if not file.exists() or file.stat().st_size < last.offset + last.num_bytes:
            raise OutputError(
                f"{file}: missing or shorter than the journal beside it says, so the run cannot be continued",
                fix="give another folder, or --overwrite to start again",
            )

    def _check_space(self) -> None:
        written = sum(file.stat().st_blocks * 512 for file in self._folder.glob("model*.safetensors*"))
        needed = self.num_bytes - written + self._also_needed_bytes
        folder = self._folder.absolute()
        free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
        if needed > free:
            raise OutputError(
                f"{self._folder}: {_gigabytes(needed)} are still to be written, but {_gigabytes(free)} are left there",
                fix="free some space, then run the same command again: finished work is kept",
            )

    def _open(self, shard: int) -> BinaryIO:
        if self._shard != shard:
            assert self._file is None, "entries arrive in order"
            path = self._partial(shard)
            self._file = path.open("r+b" if path.exists() else "w+b", buffering=0)
            with named(path):
                pwrite_all(self._file.fileno(), self._headers[shard], 0)
            sync_folder(self._folder)
            self._shard = shard
        assert self._file is not None, "opened above"
        return self._file

    def _commit(self) -> None:
        if self._file is not None and self._shard is not None:
            # the system reports lost data once: after a failure, success means nothing
            self._is_sound = False
            with named(self._partial(self._shard)):
                os.fdatasync(self._file.fileno())
            self._is_sound = True
        self._journal.append({"done": self.num_done, "notes": self._pending})
        self.notes |= self._pending
        self._pending = {}
        self._uncommitted_bytes, self._committed_at = 0, time.monotonic()

    def _close_shard(self) -> None:
        assert self._file is not None and self._shard is not None, "a full shard is open"
        self._file.close()
        self._partial(self._shard).replace(self._folder / self._names[self._shard])
        sync_folder(self._folder)
        self._file = self._shard = None

    def _partial(self, shard: int) -> Path:
        return self._folder / f"{self._names[shard]}.partial"


def _split(entries: Sequence[Sequence[OutputTensor]], max_bytes: int) -> list[list[int]]:
    """Entry numbers of each shard: filled in order up to max_bytes, an entry never divided."""
    shards: list[list[int]] = [[]]
    size = 0
    for number, entry in enumerate(entries):
        entry_bytes = sum(tensor.num_bytes for tensor in entry)
        if shards[-1] and size + entry_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(number)
        size += entry_bytes
    return shards


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3f} GB"


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
