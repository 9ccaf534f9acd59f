"""An output folder: whether it may be written, and everything of the source that is not a tensor.

Owns which files belong to a run; does not know what is in them.
"""

import enum
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from quantkit.errors import OutputError, SourceError
from quantkit.formats.durable import copy_atomically, write_atomically
from quantkit.formats.journal import JOURNAL_NAME, Journal, has_lines

PLAN_NAME = "quantkit.json"  # written last; with it, and without a journal, a folder is complete
LOG_NAME = "quantkit.log.json"
CARD_NAME = "README.md"

_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx"}
_NOT_COPIED = {"config.json", PLAN_NAME, LOG_NAME, JOURNAL_NAME}


class FolderState(enum.Enum):
    """What is in an output folder before a run."""

    EMPTY = "empty or absent"
    UNFINISHED = "a run that was interrupted"
    HALF_REMOVED = "a run whose removal was interrupted"
    FINISHED = "a finished run"
    FOREIGN = "something else"


def folder_state(folder: Path) -> FolderState:
    """What is in the folder. Raises OutputError if the path is a file, or a link to nothing."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: is a file", fix="give the name of a folder that does not exist yet")
    if folder.is_symlink() and not folder.exists():
        raise OutputError(
            f"{folder}: is a link to {folder.readlink()}, which does not exist",
            fix="create that folder, or remove the link",
        )
    if not folder.exists() or not any(folder.iterdir()):
        return FolderState.EMPTY
    if (folder / JOURNAL_NAME).exists():
        return FolderState.UNFINISHED if has_lines(folder) else FolderState.HALF_REMOVED
    return FolderState.FINISHED if (folder / PLAN_NAME).exists() else FolderState.FOREIGN


def remove_run(folder: Path) -> None:
    """Remove a finished or unfinished run of ours, folder included; interrupted, the next run completes it.

    Raises OutputError if another process is writing there.
    """
    assert folder_state(folder) not in {FolderState.EMPTY, FolderState.FOREIGN}, (
        "only what we wrote is removed"
    )
    with Journal(folder) as journal:
        journal.clear()
        for path in list(folder.iterdir()):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != JOURNAL_NAME:
                path.unlink()
        journal.remove()
    if not folder.is_symlink():
        folder.rmdir()


def check_apart(source: Path, folder: Path) -> None:
    """Raise OutputError if one of the two folders is inside the other: each run would read what it writes."""
    try:
        inner, outer = folder.resolve(), source.resolve()
    except RuntimeError:
        raise OutputError(f"{folder}: is a link that leads back to itself", fix="remove the link") from None
    if inner.is_relative_to(outer) or outer.is_relative_to(inner):
        raise OutputError(
            f"{folder}: the output and its source {source} are the same folder, or one is inside the other",
            fix="give an output folder beside the source",
        )


def check_companions(source: Path) -> None:
    """Raise SourceError if a file that `copy_companions` will copy cannot be read: better now than at the end."""
    for file in _companions(source):
        if not os.access(file, os.R_OK, effective_ids=True):
            raise SourceError(
                f"{file}: cannot be read: permission denied", fix="change its permissions, or remove the file"
            )


def copy_companions(source: Path, folder: Path) -> list[str]:
    """Copy what is not weights: tokenizer, templates, generation config, processor files, subfolders.

    The source's card is kept as README.source.md. Returns the names copied, relative to the folder.
    """
    copied = []
    for file in _companions(source):
        name = file.relative_to(source)
        target = folder / ("README.source.md" if str(name) == CARD_NAME else name)
        target.parent.mkdir(parents=True, exist_ok=True)
        copy_atomically(file, target)
        copied.append(str(target.relative_to(folder)))
    return copied


def write_json(path: Path, content: object) -> None:
    """JSON with sorted keys, atomically."""
    write_atomically(
        path, (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
    )


def _companions(source: Path) -> Iterator[Path]:
    for file in sorted(source.rglob("*")):
        name = file.relative_to(source)
        hidden = any(part.startswith(".") for part in name.parts)
        is_index = file.name.endswith(".index.json")
        is_ours = str(name) in _NOT_COPIED
        if file.is_file() and not (hidden or is_index or is_ours or file.suffix in _WEIGHT_SUFFIXES):
            yield file
