"""Token embeddings."""

import torch
from torch import Tensor
from torch.nn.functional import embedding


class Embedding:
    """Rows of a table [V, E], times a constant that is rounded to the table's dtype first (1 for most models)."""

    def __init__(self, weight_VE: Tensor, multiplier: float) -> None:
        self.weight = weight_VE
        self.multiplier = float(torch.tensor(multiplier, dtype=weight_VE.dtype))

    def __call__(self, token_ids_T: Tensor) -> Tensor:
        """[T] token ids to [T, E]."""
        hidden_TE = embedding(token_ids_T, self.weight)
        return hidden_TE if self.multiplier == 1 else hidden_TE * self.multiplier
