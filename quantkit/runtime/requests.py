"""Requests in, outputs out: an engine, its sequences and their text together.

One thread at a time may use it. Whoever asks decides when to `step`; nothing happens in between.
"""

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from llguidance import LLMatcher

from quantkit.errors import GenerationError, QuantkitError
from quantkit.runtime.engine import Engine, Event
from quantkit.runtime.grammar import GrammarCompiler
from quantkit.runtime.matchers import Matchers
from quantkit.runtime.outputs import NewToken, OutputProcessor, RequestOutput
from quantkit.runtime.sampling_params import SamplingParams
from quantkit.runtime.scheduler import Stats
from quantkit.runtime.sequence import FinishReason
from quantkit.runtime.sequence import Sequence as EngineSequence
from quantkit.runtime.tokenizer import Tokenizer


class Stepped(NamedTuple):
    """Requests that wait no longer, and what is new of those that have something new."""

    begun: list[str]
    outputs: list[RequestOutput]


class Requests:
    """The requests that an engine works on. eos_ids: the model's own stop tokens."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, *, eos_ids: frozenset[int], vocab_size: int
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._eos_ids = eos_ids
        self._vocab_size = vocab_size
        self._grammars = GrammarCompiler(tokenizer.backend, vocab_size=vocab_size, eos_ids=eos_ids)
        self._numbers = itertools.count()
        self._reset()

    def _reset(self) -> None:
        """Forget every request."""
        self._engine.reset()
        self._outputs = OutputProcessor(self._tokenizer)
        self._matchers = Matchers(self._grammars.num_tokens)
        self._sequences: dict[int, EngineSequence] = {}
        self._first: dict[str, EngineSequence] = {}  # sequence of each request, the oldest request first
        self._waiting: set[str] = set()  # requests that have not begun

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """What an interrupt leaves half done cannot be continued: every request is forgotten."""
        try:
            yield
        except QuantkitError:  # raised where all is well
            raise
        except BaseException:
            self._reset()
            raise

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do."""
        return self._engine.has_work

    @property
    def stats(self) -> Stats:
        return self._engine.scheduler.stats

    def prepare_grammars(self) -> None:
        """Do now what the first grammar would wait for, and requests that run with it."""
        self._grammars.prepare()

    def matcher(self, params: SamplingParams) -> LLMatcher | None:
        """The grammar of what params ask for, compiled, for `add`; None: they do not ask. Any thread may call this.

        Raises GenerationError if there is no such grammar, or it would take too long.
        """
        wanted = params.structured_outputs
        return None if wanted is None else self._grammars.compile(wanted)

    def add(
        self,
        request_id: str,
        text: str | None,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        is_streamed: bool,
        matcher: LLMatcher | None = None,
    ) -> None:
        """Put a request in the engine's queue: a sequence for each of its answers.

        text: the prompt as it was given, if it was a text. priority: smaller is served first. is_streamed: its outputs
        are deltas, one for each step. matcher: of `matcher`, unless it is to be called here.
        Raises GenerationError, and nothing is in the queue, for what the model does not have or cannot take.
        """
        if type(priority) is not int:
            raise GenerationError(f"priority {priority!r} makes no sense", fix="give a whole number")
        params.check_token_ids(self._vocab_size)
        _check_prompt(prompt_ids, self._vocab_size)
        matcher = matcher or self.matcher(params)
        computed, scored = _scored(prompt_ids, params)
        sequences = [
            EngineSequence(
                sequence_id=number,
                prompt_ids=computed,
                params=params.answer(index),
                eos_ids=self._eos_ids,
                priority=priority,
                arrival=number,
                **scored,
            )
            for index, number in zip(range(params.n), self._numbers, strict=False)
        ]
        numbers = [sequence.sequence_id for sequence in sequences]
        with self._all_or_nothing():
            self._engine.add(*sequences)
            self._sequences |= dict(zip(numbers, sequences, strict=True))
            if matcher is not None:
                self._matchers.add(sequences, matcher)
            self._first[request_id] = sequences[0]
            self._waiting.add(request_id)
            self._outputs.add(
                request_id, text, prompt_ids, params, numbers, now=time.monotonic(), is_streamed=is_streamed
            )

    def step(self) -> Stepped:
        """One step of the engine, as outputs of its requests; the last one of each is `finished`.

        Raises GenerationError if the device's memory does not do; end `newest_running`, and go on. Whatever else goes
        wrong, an interrupt too, ends every request.
        """
        with self._all_or_nothing():
            return self._step()

    def _step(self) -> Stepped:
        tokens = self._followed([_new_token(event) for event in self._engine.step()])
        processed = self._outputs.process(tokens, now=time.monotonic())
        for number in processed.stopped:
            self._engine.end(self._sequences[number])
        for number in [token.sequence_id for token in tokens if token.finish] + processed.stopped:
            del self._sequences[number]
            self._matchers.remove(number)
        begun = [request_id for request_id in self._waiting if self._first[request_id].generation]
        self._waiting.difference_update(begun)
        for output in processed.outputs:
            if output.finished:
                del self._first[output.request_id]
        return Stepped(begun, processed.outputs)

    def newest_running(self) -> str:
        """The request that began last, as far as the order of arrival tells."""
        return next(each for each in reversed(self._first) if self._first[each].generation)

    def end(self, request_id: str) -> None:
        """Forget a request, wherever it is; nothing happens to one that has ended."""
        with self._all_or_nothing():
            self._first.pop(request_id, None)
            self._waiting.discard(request_id)
            for number in self._outputs.abort(request_id):
                self._engine.end(self._sequences.pop(number))
                self._matchers.remove(number)

    def _followed(self, tokens: list[NewToken]) -> list[NewToken]:
        """The tokens, after what their grammars make of them: some end their sequences."""
        going_on = [
            (token.sequence_id, token.token_id)
            for token in tokens
            if token.finish is None and token.token_id is not None
        ]
        lost = self._matchers.advance(going_on)
        for number in lost:
            self._engine.end(self._sequences[number])
        return [
            token._replace(finish=FinishReason.GRAMMAR) if token.sequence_id in lost else token
            for token in tokens
        ]


def _check_prompt(prompt_ids: Sequence[int], vocab_size: int) -> None:
    """Raise GenerationError for token ids that the model does not have."""
    wrong = next(
        (token for token in prompt_ids if type(token) is not int or not 0 <= token < vocab_size), None
    )
    if wrong is not None:
        raise GenerationError(
            f"the prompt: {wrong!r} is no token of the model, which has {vocab_size}",
            fix=f"give token ids from 0 to {vocab_size - 1}, or a text",
        )


def _scored(prompt_ids: list[int], params: SamplingParams) -> tuple[list[int], dict[str, Any]]:
    """What a sequence computes of the prompt, and its fields that say what is scored.

    Where nothing is generated, the last token is not computed, only its probability.
    """
    if params.prompt_logprobs is None:
        return prompt_ids, {}
    first = max(1, params.prompt_logprobs_start)
    if first >= len(prompt_ids):
        raise GenerationError(
            f"prompt_logprobs from token {first} on of a prompt of {len(prompt_ids)}: there are none",
            fix="give a smaller prompt_logprobs_start, or a longer prompt: its first token has no probability",
        )
    computed = prompt_ids if params.max_tokens else prompt_ids[:-1]
    return computed, {"targets": prompt_ids[1:], "num_scored": first - 1}


def _new_token(event: Event) -> NewToken:
    sequence = event.sequence
    return NewToken(
        sequence.sequence_id, event.token_id, event.finish, event.logprobs, sequence.num_cached,
        sequence.prompt_logprobs,
    )  # fmt: skip
