"""What a model is built for."""

from typing import NamedTuple

import torch


class Target(NamedTuple):
    """Where a model computes, in which dtype, and whether what else is in a batch may change a row's bits."""

    device: torch.device
    dtype: torch.dtype
    batch_invariant: bool = False

    @property
    def has_kernels(self) -> bool:
        """Whether the GPU's kernels compute. They take 16-bit activations; float32 is plain torch's on any device."""
        return self.device.type == "cuda" and self.dtype != torch.float32
