"""Tensors kept on disk between evaluations: written atomically, checked when read, oldest thrown out first.

Each entry is a safetensors file with a checksum in it. Knows nothing about models; the key says all.
"""

import errno
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from quantkit.errors import SourceError
from quantkit.formats.safetensors_file import as_bytes, encode_header, read_header, read_tensor, tensor_bytes

LIMIT_BYTES = 16 << 30
FREE_BYTES = 1 << 30  # of the disk; the cache stops before it takes these
CHECKSUM = "sha256"

Tensors = Mapping[str, Tensor]


class DamagedEntryError(Exception):
    """An entry of the cache is not what was written; the caller computes it again."""


class TensorCache:
    """Entries in one folder, at most `limit_bytes` together; those in `in_use` are never thrown out."""

    def __init__(self, folder: Path, *, limit_bytes: int = LIMIT_BYTES, free_bytes: int = FREE_BYTES) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self.free_bytes = free_bytes
        self.in_use: set[str] = set()

    def has(self, key: str) -> bool:
        """Whether there is an entry, intact or not."""
        return self._file(key).is_file()

    def get(self, key: str) -> Tensors | None:
        """The entry, or None. Raises DamagedEntryError, once: a damaged entry is removed if that is allowed."""
        file = self._file(key)
        try:
            header = read_header(file)
            tensors = {name: read_tensor(info) for name, info in header.items()}
        except FileNotFoundError:
            return None
        except (SourceError, OSError):
            tensors = {}
        stored = tensors.pop(CHECKSUM, None)
        if stored is None or not torch.equal(stored, _checksum(tensors)):
            _remove(file)
            raise DamagedEntryError(f"{file} is damaged")
        _touch(file)
        return tensors

    def put(self, key: str, tensors: Tensors) -> None:
        """Write an entry. Raises OSError if it does not fit under the limit or on the disk, or cannot be written."""
        entry = {**tensors, CHECKSUM: _checksum(tensors)}
        shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in entry.items()}
        header = encode_header(shapes)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._make_room(len(header) + sum(tensor_bytes(*shape) for shape in shapes.values()))
        temporary = self.folder / f"{key}.{os.getpid()}.tmp"
        try:
            with temporary.open("wb") as file:
                file.write(header)
                for tensor in entry.values():
                    file.write(as_bytes(tensor))
            temporary.replace(self._file(key))
        finally:
            temporary.unlink(missing_ok=True)

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _make_room(self, needed_bytes: int) -> None:
        """Throw out what was used longest ago (unfinished files of killed runs are just old files)."""
        ages = sorted((status.st_mtime, status.st_size, file) for file, status in _statuses(self.folder))
        total = sum(size for _, size, _ in ages)
        free = _free_bytes(self.folder)
        for _, size, file in ages:
            if total + needed_bytes <= self.limit_bytes and free - needed_bytes >= self.free_bytes:
                break
            if file.stem not in self.in_use:
                file.unlink(missing_ok=True)
                total, free = total - size, free + size
        if total + needed_bytes > self.limit_bytes:
            limit = f"its limit of {self.limit_bytes / 1e9:.1f} GB is reached"
            raise OSError(errno.EFBIG, limit, str(self.folder))
        if free - needed_bytes < self.free_bytes:
            left = f"less than {self.free_bytes / 1e9:.1f} GB of its disk would be left"
            raise OSError(errno.ENOSPC, left, str(self.folder))


def _statuses(folder: Path) -> list[tuple[Path, os.stat_result]]:
    """Files and their status; a file that another process removes meanwhile is left out."""
    found = []
    for file in folder.iterdir():
        try:
            found.append((file, file.stat()))
        except FileNotFoundError:
            continue
    return found


def _free_bytes(folder: Path) -> int:
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize


def _checksum(tensors: Tensors) -> Tensor:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name}\0{tensors[name].dtype}\0{tuple(tensors[name].shape)}\0".encode())
        digest.update(as_bytes(tensors[name]))
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


def _touch(file: Path) -> None:
    """Mark as just used; a cache that may only be read has no order to keep."""
    try:
        os.utime(file)
    except OSError as error:
        if error.errno not in {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT}:
            raise


def _remove(file: Path) -> None:
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        if error.errno not in {errno.EROFS, errno.EACCES, errno.EPERM}:
            raise
