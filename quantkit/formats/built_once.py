"""Folders that are expensive to make and kept: built beside their place and renamed into it when complete."""

import fcntl
import shutil
from collections.abc import Callable
from pathlib import Path


def built_once(target: Path, build: Callable[[Path], None]) -> Path:
    """The folder `target`, made by `build(folder)` unless it is there.

    Interrupted at any instant, nothing of that name exists; the next call starts over. Concurrent calls wait
    for the first. What `build` raises passes through, and its half-made folder is removed.
    """
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released by the system however the process ends
        if target.is_dir():
            return target
        partial = target.with_name(f".{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed: we hold its lock
        partial.mkdir()
        try:
            build(partial)
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target
