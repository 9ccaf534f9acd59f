"""RMS normalisation, in the two ways that model families round it."""

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x), times a weight, over the last dimension; the statistics are float32.

    Two roundings exist: w · round(x̂), or, with `plus_one`, round(x̂ · (1 + w)) for a stored w around 0.
    """

    weight: Tensor

    def __init__(self, weight: Tensor, eps: float, *, plus_one: bool) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.eps = eps
        self.plus_one = plus_one

    def forward(self, x: Tensor) -> Tensor:
        """Any shape whose last dimension is the weight's; the same dtype."""
        wide = x.to(torch.float32)
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.plus_one:
            return (normed * (1.0 + self.weight.to(torch.float32))).to(x.dtype)
        return self.weight * normed.to(x.dtype)
