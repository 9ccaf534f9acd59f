"""A loaded model: token ids in, logits out, the KV cache in the caller's hands.

Shape suffixes: T tokens, V vocab.
"""

import torch
from torch import Tensor

from quantkit.errors import GenerationError
from quantkit.formats.kv_cache import StoredKV
from quantkit.runtime.kv_cache import KVCache
from quantkit.runtime.models.decoder import Decoder
from quantkit.runtime.models.spec import DecoderSpec
from quantkit.runtime.step import plan_step

CHUNK_TOKENS = 512  # of a prompt at a time, and rows of the head


class Model:
    """A decoder with its spec, its dtype, and the way its KV cache is stored (None: in that dtype)."""

    def __init__(self, decoder: Decoder, spec: DecoderSpec, dtype: torch.dtype, kv: StoredKV | None) -> None:
        self.decoder = decoder
        self.spec = spec
        self.dtype = dtype
        self.kv = kv

    def new_cache(self) -> KVCache:
        """An empty cache for one sequence."""
        return KVCache(
            num_layers=len(self.spec.layers),
            num_heads=self.spec.num_kv_heads,
            head_dim=self.spec.head_dim,
            dtype=self.dtype,
            stored=self.kv,
        )

    @torch.inference_mode()
    def logits(self, token_ids_T: Tensor) -> Tensor:
        """Next-token logits at every position of one sequence, float32 [T, V].

        token_ids_T: int64 [T], T ≥ 1. The cache is the checkpoint's own, so a quantized one shows in the result.
        """
        hidden_TE = self._run(token_ids_T, self.new_cache())
        logits_TV = torch.empty(len(hidden_TE), self.spec.vocab_size)
        for start in range(0, len(hidden_TE), CHUNK_TOKENS):
            logits_TV[start : start + CHUNK_TOKENS] = self.decoder.logits(
                hidden_TE[start : start + CHUNK_TOKENS]
            )
        return logits_TV

    @torch.inference_mode()
    def forward(self, token_ids_T: Tensor, cache: KVCache) -> Tensor:
        """Append tokens to the cache's sequence; returns the logits after the last of them, float32 [V]."""
        for chunk_T in torch.split(token_ids_T, CHUNK_TOKENS):
            hidden_TE = self._run(chunk_T, cache)
        return self.decoder.logits(hidden_TE[-1:])[0]

    def _run(self, token_ids_T: Tensor, cache: KVCache) -> Tensor:
        num_tokens = len(token_ids_T)
        self._check(token_ids_T, cache.num_tokens + num_tokens)
        step = plan_step(
            cache,
            num_tokens,
            ropes=[layer.rope for layer in self.spec.layers],
            windows=[layer.window for layer in self.spec.layers],
            head_dim=self.spec.head_dim,
        )
        hidden_TE: Tensor = self.decoder(token_ids_T, step)
        cache.advance(num_tokens)
        return hidden_TE

    def _check(self, token_ids_T: Tensor, length: int) -> None:
        if len(token_ids_T) == 0:
            raise GenerationError("no tokens to run", fix="give a text of at least one token")
        if length > self.spec.max_positions:
            raise GenerationError(
                f"{length} tokens, but the model was made for at most {self.spec.max_positions}",
                fix=f"shorten the text to {self.spec.max_positions} tokens",
            )
        low, high = int(token_ids_T.min()), int(token_ids_T.max())
        if low < 0 or high >= self.spec.vocab_size:
            raise GenerationError(
                f"token id {low if low < 0 else high} is outside of the vocabulary of {self.spec.vocab_size}",
                fix="use the tokenizer that belongs to this model",
            )
