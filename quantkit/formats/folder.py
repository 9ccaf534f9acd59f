"""An output folder: whether it may be written, and everything of the source that is not a tensor.

Owns which files belong to a run; does not know what is in them.
"""

import enum
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from quantkit.errors import OutputError
from quantkit.formats.shards import JOURNAL_NAME, write_atomically

PLAN_NAME = "quantkit.json"  # written last but the journal's removal: a folder that has it is complete
LOG_NAME = "quantkit.log.json"
CARD_NAME = "README.md"

_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx"}
_NOT_COPIED = {"config.json", PLAN_NAME, LOG_NAME, JOURNAL_NAME}


class FolderState(enum.Enum):
    """What is in an output folder before a run."""

    EMPTY = "empty or absent"
    UNFINISHED = "a run that was interrupted"
    FINISHED = "a finished run"
    FOREIGN = "something else"


def folder_state(folder: Path) -> FolderState:
    """What is in the folder. Raises OutputError if the path is a file."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: is a file", fix="give the name of a folder that does not exist yet")
    if not folder.exists() or not any(folder.iterdir()):
        return FolderState.EMPTY
    if (folder / JOURNAL_NAME).exists():
        return FolderState.UNFINISHED
    return FolderState.FINISHED if (folder / PLAN_NAME).exists() else FolderState.FOREIGN


def remove_run(folder: Path) -> None:
    """Remove a finished or unfinished run of ours, folder included."""
    assert folder_state(folder) in {FolderState.UNFINISHED, FolderState.FINISHED}, (
        "only what we wrote is removed"
    )
    shutil.rmtree(folder)


def copy_companions(source: Path, folder: Path) -> list[str]:
    """Copy what is not weights: tokenizer, templates, generation config, processor files, subfolders.

    The source's card is kept as README.source.md. Returns the names copied, relative to the folder.
    """
    copied = []
    for file in _companions(source):
        name = file.relative_to(source)
        target = folder / ("README.source.md" if str(name) == CARD_NAME else name)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, file.read_bytes())
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
