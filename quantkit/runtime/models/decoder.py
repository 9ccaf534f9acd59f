"""The decoder that all families share. What differs between them is in the DecoderSpec and in the modules given.

    x, residual ─► norm(x + residual) ─► attention ─► x ─► norm(x + residual) ─► MLP ─► x ─► next layer

The sum of a layer's input and what its parts gave is made in front of the next norm, in the residual's memory.
Shape suffixes: T tokens, E hidden size, V vocab.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from quantkit.runtime.layers.attention import Attention
from quantkit.runtime.layers.embedding import Embedding
from quantkit.runtime.layers.mlp import GatedMLP
from quantkit.runtime.layers.moe import SparseMLP
from quantkit.runtime.layers.norm import RMSNorm, SumOfNorm
from quantkit.runtime.layers.rows import AnyLinear
from quantkit.runtime.step import Step
from quantkit_kernels.paged_kv import KVPool


class DecoderLayer:
    """Attention and MLP, each behind a norm of everything before it."""

    def __init__(
        self,
        attention: Attention,
        mlp: GatedMLP | SparseMLP,
        *,
        before_attention: RMSNorm | SumOfNorm,
        before_mlp: RMSNorm | SumOfNorm,
    ) -> None:
        self.attention = attention
        self.mlp = mlp
        self.before_attention, self.before_mlp = before_attention, before_mlp

    def __call__(
        self, x_TE: Tensor, residual_TE: Tensor | None, step: Step, pool: KVPool
    ) -> tuple[Tensor, Tensor]:
        """x and residual, whose sum is the hidden state, to those after the layer."""
        rows, residual_TE = self.before_attention(x_TE, residual_TE, self.attention.input_codes)
        x_TE = self.attention(rows, step, pool)
        rows, residual_TE = self.before_mlp(x_TE, residual_TE, self.mlp.input_codes)
        return self.mlp(rows), residual_TE


class Decoder:
    """Embedding, layers, last norm, head."""

    def __init__(
        self,
        embedding: Embedding,
        layers: list[DecoderLayer],
        norm: RMSNorm,
        head: AnyLinear,
        *,
        logit_softcap: float | None,
    ) -> None:
        self.embedding = embedding
        self.layers = layers
        self.norm = norm
        self.head = head
        self.logit_softcap = logit_softcap

    def __call__(self, step: Step, pools: Sequence[KVPool]) -> Tensor:
        """Hidden states [T, E] after the last norm; the new tokens' keys and values are in the pools, one per layer."""
        x_TE: Tensor = self.embedding(step.token_ids_T)
        residual_TE: Tensor | None = None
        for layer, pool in zip(self.layers, pools, strict=True):
            x_TE, residual_TE = layer(x_TE, residual_TE, step, pool)
        hidden_TE, _ = self.norm(x_TE, residual_TE)
        assert isinstance(hidden_TE, Tensor), "no codes were asked for"
        return hidden_TE

    def logits(self, hidden_TE: Tensor) -> Tensor:
        """[T, E] to [T, V], in the dtype of the model."""
        logits_TV = self.head(hidden_TE)
        if self.logit_softcap is not None:
            logits_TV = torch.tanh(logits_TV / self.logit_softcap) * self.logit_softcap
        return logits_TV
