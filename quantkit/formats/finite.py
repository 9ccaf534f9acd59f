"""Weights that cannot be quantized, because they are no numbers."""

import torch
from torch import Tensor

from quantkit.errors import SourceError
from quantkit.formats.safetensors_file import TensorInfo


def check_finite(info: TensorInfo, weights: Tensor) -> None:
    """Raise SourceError if any of these weights, read from where `info` says, is NaN or infinite."""
    if not torch.isfinite(weights).all():
        kind = "NaN" if weights.isnan().any() else "infinite"
        raise SourceError(
            f"{info.file}: {info.name} has {kind} weights",
            fix="fetch the checkpoint again: it is damaged; or list the linear under `ignore`",
        )
