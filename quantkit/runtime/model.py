"""A loaded model: token ids in, logits out, one sequence at a time. Many at a time are the engine's business.

Shape suffixes: T tokens, V vocab, E hidden size.
"""

import torch
from torch import Tensor

from quantkit.errors import GenerationError
from quantkit.runtime.kv_pool import KVFormat
from quantkit.runtime.models.decoder import Decoder
from quantkit.runtime.models.spec import DecoderSpec
from quantkit.runtime.step import Row, build_step
from quantkit.runtime.target import Target
from quantkit_kernels.paged_kv import BLOCK_SIZE

CHUNK_TOKENS = 512  # of a text at a time


class Cache:
    """The pools of a single sequence, with room for `capacity` tokens; `num_tokens` are in it."""

    def __init__(self, kv: KVFormat, capacity: int, device: torch.device) -> None:
        # torch's attention reads a block where it lies: on a CPU all tokens are in one, a power of two as the kernels'
        self.block_size = (
            max(BLOCK_SIZE, 1 << (capacity - 1).bit_length()) if device.type == "cpu" else BLOCK_SIZE
        )
        self.blocks = range(-(-capacity // self.block_size))
        self.pools = kv.create_pools(len(self.blocks), device, block_size=self.block_size)
        self.num_tokens = 0


class Model:
    """A decoder with its spec, what it was built for, and how it stores keys and values."""

    def __init__(self, decoder: Decoder, spec: DecoderSpec, target: Target, kv: KVFormat) -> None:
        self.decoder = decoder
        self.spec = spec
        self.target = target
        self.kv = kv

    @property
    def dtype(self) -> torch.dtype:
        """Of activations, norms and 16-bit weights."""
        return self.target.dtype

    def new_cache(self, capacity: int) -> Cache:
        """An empty cache for one sequence of at most so many tokens."""
        return Cache(self.kv, capacity, self.target.device)

    @torch.inference_mode()
    def logits(self, token_ids_T: Tensor) -> Tensor:
        """Next-token logits at every position of one sequence, float32 [T, V] on the CPU.

        token_ids_T: int64 [T], T ≥ 1. The cache is the checkpoint's own, so a quantized one shows in the result.
        """
        cache = self.new_cache(len(token_ids_T))
        logits_TV = torch.empty(len(token_ids_T), self.spec.vocab_size)
        for start in range(0, max(len(token_ids_T), 1), CHUNK_TOKENS):
            chunk = slice(start, start + CHUNK_TOKENS)
            logits_TV[chunk] = self.decoder.logits(self._run(token_ids_T[chunk], cache))
        return logits_TV

    @torch.inference_mode()
    def forward(self, token_ids_T: Tensor, cache: Cache) -> Tensor:
        """Append tokens to the cache's sequence; returns the logits after the last of them, float32 [V] on the CPU."""
        for chunk_T in torch.split(token_ids_T, CHUNK_TOKENS):
            hidden_TE = self._run(chunk_T, cache)
        return self.decoder.logits(hidden_TE[-1:])[0].to("cpu", torch.float32)

    def _run(self, token_ids_T: Tensor, cache: Cache) -> Tensor:
        self._check(token_ids_T, cache.num_tokens + len(token_ids_T))
        row = Row(token_ids_T.tolist(), cache.num_tokens, cache.blocks)
        step = build_step([row], block_size=cache.block_size, device=self.target.device)
        hidden_TE: Tensor = self.decoder(step, cache.pools)
        cache.num_tokens = row.length
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
