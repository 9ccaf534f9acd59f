"""The journal of a run: JSON lines in the output folder, durable one by one, locked against a second process.

A folder that has it holds an unfinished run. A journal without a complete line says that whatever else is in
the folder is to be removed: that is how a removal which was interrupted is told from a run.
"""

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Self

from quantkit.errors import OutputError
from quantkit.formats.durable import named, sync_folder

JOURNAL_NAME = ".quantkit-progress.jsonl"


class Journal:
    """The opened journal of a folder that exists; use as a context manager, which holds the lock.

    Entering raises OutputError if another process holds it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / JOURNAL_NAME

    def __enter__(self) -> Self:
        self._file: BinaryIO = self._path.open("a+b", buffering=0)
        try:
            with named(self._path):
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_current = self._path.exists() and self._path.samefile(f"/proc/self/fd/{self._file.fileno()}")
            sync_folder(self._folder)
        except BlockingIOError:
            is_current = False
        except BaseException:
            self._file.close()
            raise
        if not is_current:  # locked by another process, or removed by it between our opening and our locking
            self._file.close()
            raise OutputError(
                f"{self._folder}: another process is writing here", fix="wait for it, or give another folder"
            )
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self) -> list[dict[str, Any]]:
        """All complete lines; a last line that was torn by the end of the process is dropped for good.

        Raises OutputError if the rest is not what `append` wrote.
        """
        self._file.seek(0)
        *lines, torn = self._file.read().split(b"\n")
        if torn:
            with named(self._path):
                self._file.truncate(sum(len(line) + 1 for line in lines))
        try:
            content = [json.loads(line) for line in lines]
        except ValueError:
            content = [None]
        if not all(isinstance(line, dict) for line in content):
            raise OutputError(
                f"{self._path}: damaged, so the run cannot be continued",
                fix="give another folder, or --overwrite to start again",
            )
        return content

    def append(self, line: Mapping[str, Any]) -> None:
        """Add a line, on disk when this returns."""
        data = json.dumps(line, separators=(",", ":")).encode() + b"\n"
        with named(self._path):
            while data:
                data = data[os.write(self._file.fileno(), data) :]
            os.fsync(self._file.fileno())

    def clear(self) -> None:
        """Drop all lines: from now on, what else is in the folder is to be removed."""
        with named(self._path):
            self._file.truncate(0)
            os.fsync(self._file.fileno())

    def remove(self) -> None:
        """The folder is complete, or empty."""
        sync_folder(self._folder)  # what was renamed into place stays, whatever happens to the next line
        self._path.unlink()
        sync_folder(self._folder)


def has_lines(folder: Path) -> bool:
    """Whether the folder's journal has a complete line."""
    return b"\n" in (folder / JOURNAL_NAME).read_bytes()
