"""A huggingface_hub cache written by hand: refs, blobs, and a snapshot of symlinks into them."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tests.checkpoints import write_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write_hub_cache(
    cache: Path, repo: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any], revision: str = "main"
) -> Path:
    """Put a checkpoint into `cache` as if `repo` had been downloaded; returns the snapshot folder."""
    storage = cache / f"models--{repo.replace('/', '--')}"
    files = write_checkpoint(cache / "made-here", tensors, config)
    snapshot = storage / "snapshots" / COMMIT
    for folder in (storage / "blobs", storage / "refs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    for file in files.iterdir():
        blob = storage / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        file.rename(blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    files.rmdir()
    (storage / "refs" / revision).write_text(COMMIT)
    return snapshot
