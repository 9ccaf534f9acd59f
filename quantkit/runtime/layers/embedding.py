"""Token embeddings."""

import torch
from torch import Tensor, nn


class Embedding(nn.Module):
    """Rows of a table [V, E], times a constant that is rounded to the table's dtype first (1 for most models)."""

    weight: Tensor
    multiplier: Tensor

    def __init__(self, weight_VE: Tensor, multiplier: float) -> None:
        super().__init__()
        self.register_buffer("weight", weight_VE)
        self.register_buffer("multiplier", torch.tensor(multiplier, dtype=weight_VE.dtype))
        self.is_scaled = multiplier != 1.0

    def forward(self, token_ids_T: Tensor) -> Tensor:
        """[T] token ids to [T, E]."""
        hidden_TE = nn.functional.embedding(token_ids_T, self.weight)
        return hidden_TE * self.multiplier if self.is_scaled else hidden_TE
