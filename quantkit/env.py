"""Every QUANTKIT_* environment variable, typed; and what libraries are told through theirs."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """Where converted GGUF checkpoints and cached reference logits live: QUANTKIT_CACHE, or ~/.cache/quantkit."""
    configured = os.environ.get("QUANTKIT_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "quantkit"


def deterministic_cublas() -> None:
    """Ask cuBLAS for results that do not differ from run to run; to be called before it is first used."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
