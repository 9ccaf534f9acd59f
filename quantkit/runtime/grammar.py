"""Grammars that answers follow, compiled by llguidance. Free of torch: whoever only checks one starts quickly.

What compiling and a step may take is bounded, but for schemas that intersect many patterns: whoever takes grammars from
strangers has them checked in a process that can be ended.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from quantkit.errors import GenerationError
from quantkit.runtime.structured_outputs import StructuredOutputsParams, json_rule

# 20 ms of a text's tokens through a lexer, 40 MB of its states; errors without the grammar in them
LIMITS = LLParserLimits(
    initial_lexer_fuel=200_000,
    step_lexer_fuel=50_000,
    step_max_items=20_000,
    max_lexer_states=20_000,
    max_grammar_size=50_000,
    precompute_large_lexemes=False,
    verbose_errors=False,
)
# any tokens that make up a text that is prescribed; to find the usual ones takes seconds if it is long
FREE_TOKENS = '%llguidance {"no_forcing": true}\n'
MAX_ERROR_CHARS = 300
NO_ANSWER = "NoExtensionBias"  # llguidance's word for it
NUM_KEPT = 16  # compiled grammars


def grammar_text(wanted: StructuredOutputsParams) -> str:
    """The grammar, as llguidance reads it. Raises GenerationError for a JSON schema that is none."""
    if wanted.grammar is not None:
        return wanted.grammar
    if wanted.regex is not None:
        return LLMatcher.grammar_from_regex(wanted.regex)
    if wanted.choice:
        return f"{FREE_TOKENS}start: {' | '.join(map(json.dumps, wanted.choice))}\n"
    rule = json_rule({"type": "object"} if wanted.json is None else wanted.json)
    return f"{FREE_TOKENS}start: answer\nanswer: {rule}\n"


def problem_of(grammar: str) -> str | None:
    """What is wrong with a grammar, whatever the tokens; None: nothing."""
    problem = LLMatcher.validate_grammar(grammar, limits=LIMITS)
    return _shortened(problem) if problem and not problem.startswith("WARNING") else None


def refused(problem: str) -> GenerationError:
    """The error for a grammar with a problem."""
    return GenerationError(
        f"the grammar cannot be followed: {problem}", fix="give a simpler one, without what is named"
    )


class GrammarCompiler:
    """Of one model; any thread may use it. tokenizer: transformers' own object."""

    def __init__(self, tokenizer: Any, *, vocab_size: int, eos_ids: Iterable[int]) -> None:
        self._backend = tokenizer
        self.num_tokens = max(vocab_size, len(tokenizer))  # of a mask
        self._eos_ids = sorted(eos_ids)
        self._lock = threading.Lock()
        self._tokens: LLTokenizer | None = None  # a second to make
        self._kept: OrderedDict[str, LLMatcher] = OrderedDict()

    def prepare(self) -> None:
        """Make the tokens' trie, a second's work, unless no grammar could ever end."""
        with self._lock:
            if self._eos_ids and self._tokens is None:
                self._tokens = self._make_tokens()

    def compile(self, wanted: StructuredOutputsParams) -> LLMatcher:
        """A matcher at the beginning of an answer. Raises GenerationError for what cannot be compiled."""
        grammar = grammar_text(wanted)
        with self._lock:
            if grammar not in self._kept:
                self._kept[grammar] = self._compiled(grammar)
                if len(self._kept) > NUM_KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(grammar)
            return self._kept[grammar].deep_copy()

    def _compiled(self, grammar: str) -> LLMatcher:
        if self._tokens is None:
            self._tokens = self._make_tokens()
        matcher = LLMatcher(self._tokens, grammar, limits=LIMITS, log_level=0)
        matcher.compute_bitmask()  # finds out if nothing can begin it
        if matcher.is_error():
            problem = matcher.get_error()
            raise refused("no answer fits it" if NO_ANSWER in problem else _shortened(problem))
        return matcher

    def _make_tokens(self) -> LLTokenizer:
        from llguidance.hf import from_tokenizer  # imports transformers

        if not self._eos_ids:
            raise GenerationError(
                "the model has no stop token, so no grammar could end",
                fix="name eos_token_id in its config.json",
            )
        return from_tokenizer(self._backend, n_vocab=self.num_tokens, eos_token=self._eos_ids)


def _shortened(problem: str) -> str:
    line = " ".join(problem.split())
    return line if len(line) <= MAX_ERROR_CHARS else f"{line[:MAX_ERROR_CHARS]}…"
