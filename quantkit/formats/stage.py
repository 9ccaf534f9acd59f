"""Finished layers of a calibrated run, kept in the output folder until the shards are written.

One file per layer, with the final tensors under their final names, and what there is to say about them:

    DIR/.quantkit-layers/00000.safetensors

A file is there whole or not at all, so a run that is killed loses the layer it was at. Whether the files belong to
the plan at hand is the journal's to say, which lies beside them.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from quantkit.formats.durable import sync_folder
from quantkit.formats.safetensors_file import (
    TensorInfo,
    read_header,
    read_metadata,
    read_tensor,
    write_safetensors,
)

STAGE_NAME = ".quantkit-layers"


class Stage:
    """The staged parts of one run; a part is a layer's number or a name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / STAGE_NAME

    def write(self, part: str, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        """Keep a part, on disk when this returns."""
        if not self._folder.exists():
            self._folder.mkdir()
            sync_folder(self._folder.parent)
        metadata = {"notes": json.dumps(notes, sort_keys=True)}
        write_safetensors(self._path(part), tensors, metadata=metadata)

    @property
    def num_bytes(self) -> int:
        """Room on disk that the stage takes now."""
        return sum(file.stat().st_blocks * 512 for file in self._folder.glob("*"))

    def has(self, part: str) -> bool:
        """Whether the part is finished."""
        return self._path(part).is_file()

    def parts(self) -> list[str]:
        """Finished parts, in the order of their names."""
        return sorted(file.stem for file in self._folder.glob("*.safetensors"))

    def infos(self, part: str) -> dict[str, TensorInfo]:
        """Where the part's tensors lie."""
        return dict(read_header(self._path(part)))

    def read(self, part: str) -> dict[str, Tensor]:
        """The part's tensors by name."""
        return {name: read_tensor(info) for name, info in self.infos(part).items()}

    def notes(self, part: str) -> dict[str, Any]:
        """What was said about the part."""
        notes: dict[str, Any] = json.loads(read_metadata(self._path(part))["notes"])
        return notes

    def drop(self, part: str) -> None:
        """Remove a part that is no longer needed."""
        self._path(part).unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove everything: the shards have it."""
        if self._folder.exists():
            shutil.rmtree(self._folder)

    def _path(self, part: str) -> Path:
        return self._folder / f"{part}.safetensors"


def layer_part(layer: int) -> str:
    """The part that holds a layer."""
    return f"{layer:05}"
