"""A loaded model: token ids in, logits out, for texts that are there already. To write them is the engine's business.

Shape suffixes: B sequences, T tokens of each, R some of them, V vocab, E hidden size.
"""

from collections.abc import Iterator, Sequence

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
LOGITS_ELEMENTS = 1 << 26  # at a time


class Cache:
    """The pools of sequences, with room for `capacity` tokens of each; `num_tokens` of each are in it."""

    def __init__(self, kv: KVFormat, capacity: int, device: torch.device, num_sequences: int = 1) -> None:
        # torch's attention reads a block where it lies: on a CPU all tokens are in one, a power of two as the kernels'
        self.block_size = (
            max(BLOCK_SIZE, 1 << (capacity - 1).bit_length()) if device.type == "cpu" else BLOCK_SIZE
        )
        each = -(-capacity // self.block_size)
        self.blocks = [range(number * each, (number + 1) * each) for number in range(num_sequences)]
        self.pools = kv.create_pools(num_sequences * each, device, block_size=self.block_size)
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

    def logits(self, token_ids_T: Tensor) -> Tensor:
        """Next-token logits at every position of one text, float32 [T, V] on the CPU.

        token_ids_T: int64 [T], T ≥ 1. The cache is the checkpoint's own, so a quantized one shows in the result.
        """
        (parts,) = self.predictions([token_ids_T], step_tokens=CHUNK_TOKENS)
        return torch.cat([part_RV.to("cpu", torch.float32) for part_RV in parts])

    @torch.inference_mode()
    def predictions(
        self, texts: Sequence[Tensor], *, step_tokens: int = CHUNK_TOKENS
    ) -> Iterator[Iterator[Tensor]]:
        """Next-token logits at every position of texts of one length, text by text, some positions at a time.

        texts: int64 [T] each, T ≥ 1. A step computes several of them, or a part of one: at most step_tokens tokens.
        Gives each text's [R, V] in the dtype of the model, on its device, made when they are asked for.
        """
        together = max(1, step_tokens // max(1, len(texts[0])))
        for first in range(0, len(texts), together):
            token_ids_BT = torch.stack(list(texts[first : first + together]))
            for hidden_TE in self._hidden(token_ids_BT, step_tokens):
                yield self._logits(hidden_TE)

    @torch.inference_mode()
    def forward(self, token_ids_T: Tensor, cache: Cache) -> Tensor:
        """Append tokens to the cache's sequence; returns the logits after the last of them, float32 [V] on the CPU."""
        for chunk_T in torch.split(token_ids_T, CHUNK_TOKENS):
            hidden_TE = self._run(chunk_T[None], cache)[0]
        return self.decoder.logits(hidden_TE[-1:])[0].to("cpu", torch.float32)

    @torch.inference_mode()
    def greedy(self, token_ids_T: Tensor, num_tokens: int) -> list[int]:
        """The `num_tokens` likeliest tokens, one after another, that follow a text; an end token does not end them."""
        cache = self.new_cache(len(token_ids_T) + num_tokens)
        written: list[int] = []
        for _ in range(num_tokens):
            written.append(int(self.forward(token_ids_T, cache).argmax()))
            token_ids_T = torch.tensor(written[-1:])
        return written

    def _hidden(self, token_ids_BT: Tensor, step_tokens: int) -> Tensor:
        """[B, T, E] after the last norm."""
        num_texts, length = token_ids_BT.shape
        cache = Cache(self.kv, length, self.target.device, num_texts)
        chunks = torch.split(token_ids_BT, max(1, step_tokens // num_texts), dim=1)
        return torch.cat([self._run(chunk_BT, cache) for chunk_BT in chunks], dim=1)

    @torch.inference_mode()
    def _logits(self, hidden_TE: Tensor) -> Iterator[Tensor]:
        for hidden_RE in torch.split(hidden_TE, max(1, LOGITS_ELEMENTS // self.spec.vocab_size)):
            yield self.decoder.logits(hidden_RE)

    def _run(self, token_ids_BT: Tensor, cache: Cache) -> Tensor:
        """Append as many tokens to each sequence of the cache: hidden states [B, T, E]."""
        self._check(token_ids_BT, cache.num_tokens + token_ids_BT.shape[1])
        rows = [
            Row(token_ids, cache.num_tokens, blocks)
            for token_ids, blocks in zip(token_ids_BT.tolist(), cache.blocks, strict=True)
        ]
        step = build_step(rows, block_size=cache.block_size, device=self.target.device)
        hidden_TE: Tensor = self.decoder(step, cache.pools)
        cache.num_tokens = rows[0].length
        return hidden_TE.view(*token_ids_BT.shape, -1)

    def _check(self, token_ids_BT: Tensor, length: int) -> None:
        if token_ids_BT.numel() == 0:
            raise GenerationError("no tokens to run", fix="give a text of at least one token")
        if length > self.spec.max_positions:
            raise GenerationError(
                f"{length} tokens, but the model was made for at most {self.spec.max_positions}",
                fix=f"shorten the text to {self.spec.max_positions} tokens",
            )
        low, high = int(token_ids_BT.min()), int(token_ids_BT.max())
        if low < 0 or high >= self.spec.vocab_size:
            raise GenerationError(
                f"token id {low if low < 0 else high} is outside of the vocabulary of {self.spec.vocab_size}",
                fix="use the tokenizer that belongs to this model",
            )
