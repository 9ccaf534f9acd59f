"""The decoder that all families share. What differs between them is in the DecoderSpec and in the modules given.

Shape suffixes: T tokens, E hidden size, V vocab.
"""

import torch
from torch import Tensor, nn

from quantkit.runtime.layers.attention import Attention
from quantkit.runtime.layers.embedding import Embedding
from quantkit.runtime.layers.mlp import GatedMLP
from quantkit.runtime.layers.norm import RMSNorm
from quantkit.runtime.step import Step


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual; a second norm each where given."""

    def __init__(
        self,
        attention: Attention,
        mlp: GatedMLP,
        *,
        before_attention: RMSNorm,
        after_attention: RMSNorm | None,
        before_mlp: RMSNorm,
        after_mlp: RMSNorm | None,
    ) -> None:
        super().__init__()
        self.attention = attention
        self.mlp = mlp
        self.before_attention, self.after_attention = before_attention, after_attention
        self.before_mlp, self.after_mlp = before_mlp, after_mlp

    def forward(self, hidden_TE: Tensor, step: Step) -> Tensor:
        """[T, E] to [T, E]."""
        attended: Tensor = self.attention(self.before_attention(hidden_TE), step)
        if self.after_attention is not None:
            attended = self.after_attention(attended)
        hidden_TE = hidden_TE + attended
        projected: Tensor = self.mlp(self.before_mlp(hidden_TE))
        if self.after_mlp is not None:
            projected = self.after_mlp(projected)
        return hidden_TE + projected


class Decoder(nn.Module):
    """Embedding, layers, last norm, head."""

    def __init__(
        self,
        embedding: Embedding,
        layers: list[DecoderLayer],
        norm: RMSNorm,
        head: nn.Module,
        *,
        logit_softcap: float | None,
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.head = head
        self.logit_softcap = logit_softcap

    def forward(self, token_ids_T: Tensor, step: Step) -> Tensor:
        """Hidden states [T, E] before the head; every layer appends to the step's cache."""
        hidden_TE: Tensor = self.embedding(token_ids_T)
        for layer in self.layers:
            hidden_TE = layer(hidden_TE, step)
        normed: Tensor = self.norm(hidden_TE)
        return normed

    def logits(self, hidden_TE: Tensor) -> Tensor:
        """[T, E] to float32 [T, V]."""
        logits_TV: Tensor = self.head(hidden_TE)
        if self.logit_softcap is not None:
            logits_TV = torch.tanh(logits_TV / self.logit_softcap) * self.logit_softcap
        return logits_TV.to(torch.float32)
