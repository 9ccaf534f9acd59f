"""Random weights and correlated inputs, as layers have them."""

import torch
from torch import Tensor


def inputs(num_tokens: int, num_features: int, seed: int = 0) -> Tensor:
    """Correlated inputs [T, K] with a few large channels."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(num_features, num_features, generator=generator) / num_features**0.5
    x_TK = torch.randn(num_tokens, num_features, generator=generator) @ (mix + torch.eye(num_features) / 4)
    return x_TK * (1 + 8 * (torch.rand(num_features, generator=generator) < 0.05))


def hessian(num_features: int, seed: int = 0) -> Tensor:
    """Mean of x xᵀ over such inputs, float32."""
    x_TK = inputs(4 * num_features + 16, num_features, seed)
    return x_TK.T @ x_TK / len(x_TK)


def weights(rows: int, cols: int, seed: int = 0) -> Tensor:
    """Gaussian weights with a few large ones."""
    generator = torch.Generator().manual_seed(seed)
    w_NK = torch.randn(rows, cols, generator=generator)
    return w_NK * (1 + 4 * (torch.rand(rows, cols, generator=generator) < 0.02))
