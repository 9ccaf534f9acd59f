"""Every QUANTKIT_* environment variable, typed; and what libraries are told through theirs."""

import ctypes
import os
import platform
from pathlib import Path

# parameters of glibc's mallopt(3)
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
TOP_PAD_BYTES = 64 << 20


def cache_dir() -> Path:
    """Where converted GGUF checkpoints and cached reference logits live: QUANTKIT_CACHE, or ~/.cache/quantkit."""
    configured = os.environ.get("QUANTKIT_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "quantkit"


def api_keys() -> tuple[str, ...]:
    """Keys that a server asks its clients for: QUANTKIT_API_KEYS, with commas between them."""
    return tuple(key.strip() for key in os.environ.get("QUANTKIT_API_KEYS", "").split(",") if key.strip())


def deterministic_cublas() -> None:
    """Ask cuBLAS for results that do not differ from run to run; to be called before it is first used."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def keep_freed_memory() -> None:
    """Have this process reuse memory that it freed, in huge pages, instead of giving it back; before torch allocates.

    Every temporary of more than a few MB is otherwise mapped anew, zeroed page by page and unmapped: calibrating spends
    a quarter of its CPU time on that. For a process of our own only, not for one that imports quantkit. Without glibc
    it does nothing.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # of torch: madvise(MADV_HUGEPAGE)
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, TOP_PAD_BYTES)):
            mallopt(parameter, value)
