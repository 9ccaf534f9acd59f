"""Which tokens the grammars of sequences allow next: matchers on the host, masks for the sampler.

Shape suffixes: M sequences with a grammar, W words of 32 tokens, a bit each, the lowest first.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from llguidance import LLExecutor, LLMatcher

from quantkit.runtime.sequence import Sequence as EngineSequence


class _Guided(NamedTuple):
    sequence: EngineSequence
    matcher: LLMatcher


class Matchers:
    """The grammars of the sequences that have one, each where its sequence is. num_tokens: those of a mask."""

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens
        self._guided: dict[int, _Guided] = {}

    @cached_property
    def _executor(self) -> LLExecutor:
        return LLExecutor()  # threads

    def add(self, sequences: Sequence[EngineSequence], matcher: LLMatcher) -> None:
        """New sequences, none of which has a token. Raises nothing: a matcher has been compiled."""
        for sequence in sequences:
            self._guided[sequence.sequence_id] = _Guided(sequence, matcher.deep_copy())
        self._write([self._guided[sequence.sequence_id] for sequence in sequences])

    def advance(self, new_tokens: dict[int, int]) -> list[int]:
        """Tokens by sequence, which goes on; those without a grammar are passed over.

        Returns the sequences that can go no further: their grammar does not take the token, or takes too long.
        """
        guided = {number: self._guided[number] for number in new_tokens if number in self._guided}
        if not guided:
            return []
        pairs = [(each.matcher, new_tokens[number]) for number, each in guided.items()]
        self._executor.consume_token_par(pairs)
        self._write(list(guided.values()))
        return [number for number, each in guided.items() if each.matcher.is_error()]

    def remove(self, number: int) -> None:
        """A sequence has ended, with a grammar or without."""
        self._guided.pop(number, None)

    def _write(self, guided: list[_Guided]) -> None:
        num_words = -(-self._num_tokens // 32)
        mask_MW = torch.zeros(len(guided), num_words, dtype=torch.int32)
        matchers = [(each.matcher, index) for index, each in enumerate(guided)]
        self._executor.unsafe_compute_mask_ptr(matchers, mask_MW.data_ptr(), 4 * num_words, len(guided))
        for (sequence, _), mask_W in zip(guided, mask_MW, strict=True):
            sequence.mask = mask_W
