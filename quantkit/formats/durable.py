"""Writing that survives the death of the process: whole files or none, renames on disk, errors that name the file.

Linux reports a full disk from `pwrite` or `fsync` without saying which file it was; `named` adds it.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: Path, *parts: bytes | memoryview) -> None:
    """The file has its old content or all of the new, part after part, whenever the process dies."""
    with _replaced(path) as file:
        for part in parts:
            file.write(part)


def copy_atomically(source: Path, path: Path) -> None:
    """A file's content (of what a link points to) under another name, whole or not at all, a piece at a time."""
    with source.open("rb") as original, _replaced(path) as file:
        shutil.copyfileobj(original, file, 1 << 20)


def sync_folder(folder: Path) -> None:
    """Make creations, renames and removals in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with named(folder):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def pwrite_all(descriptor: int, data: bytes | memoryview, position: int) -> None:
    """Write all of the data at a position; the system may take it in parts."""
    view = memoryview(data)
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done : done + (1 << 30)], position + done)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """An OSError raised inside names this file if it names none."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def _replaced(path: Path) -> Iterator[BinaryIO]:
    temporary = path.with_name(f".{path.name}.partial")
    with named(path):
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    sync_folder(path.parent)
