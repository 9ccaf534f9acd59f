"""Which tokens the grammars of sequences allow next: matchers on the host, masks for the sampler.

Shape suffixes: M sequences with a grammar, W words of 32 tokens, a bit each, the lowest first.
"""

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from llguidance import LLExecutor, LLMatcher

from quantkit.runtime.sequence import Sequence as EngineSequence


class _Guided(NamedTuple):
    sequence: EngineSequence
    matcher: LLMatcher


class Matchers:
    """Of the sequences that have a grammar, each as far as its sequence. num_tokens: those of a mask."""

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

    def advance(self, new_tokens: Iterable[tuple[int, int]]) -> list[int]:
        """Sequences that go on, by number, and their tokens; those without a grammar are passed over.

        Returns the sequences that can go no further: their grammar does not take the token, or takes too long.
        """
        pairs = [(self._guided[number], token) for number, token in new_tokens if number in self._guided]
        if not pairs:
            return []
        guided = [each for each, _ in pairs]
        self._executor.consume_token_par([(each.matcher, token) for each, token in pairs])
        self._write(guided)
        return [each.sequence.sequence_id for each in guided if each.matcher.is_error()]

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
