"""Every QUANTKIT_* environment variable, typed."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """Where converted GGUF checkpoints and cached reference logits live: QUANTKIT_CACHE, or ~/.cache/quantkit."""
    configured = os.environ.get("QUANTKIT_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "quantkit"
