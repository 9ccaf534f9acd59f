"""What a request gets: text out of tokens, cut at stop strings, with the reason why it ended.

engine's new tokens ─► whole characters ─► no stop string ─► deltas of a request, or all of it at its end
                                                └─► sequences that have ended by one: for the engine to abort
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from quantkit.runtime.logprobs import TokenLogprobs
from quantkit.runtime.sampling_params import SamplingParams
from quantkit.runtime.sequence import FinishReason
from quantkit.runtime.stop_strings import StopStrings
from quantkit.runtime.tokenizer import Tokenizer


class NewToken(NamedTuple):
    """What the engine says of a sequence after a step. num_cached_tokens: of its prompt, found in the cache.

    token_id: None where it ended without one, since the model's logits were no numbers. prompt_logprobs: of the last
    tokens of its prompt.
    """

    sequence_id: int
    token_id: int | None
    finish: FinishReason | None
    logprobs: TokenLogprobs | None = None
    num_cached_tokens: int = 0
    prompt_logprobs: Sequence[TokenLogprobs] = ()


class Logprob(NamedTuple):
    """Of a token that was chosen, or could have been."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """One answer; in a delta, what is new of it.

    finish_reason: None while it goes on. stop_reason: the stop string or the token of `stop_token_ids` that ended it.
    logprobs: by token id, of each of `token_ids`. cumulative_logprob: of the whole answer so far.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    logprobs: list[dict[int, Logprob]] | None
    cumulative_logprob: float | None


class RequestMetrics(NamedTuple):
    """Times in seconds, of one clock; None: not yet."""

    arrival_time: float
    first_token_time: float | None
    finished_time: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """Of one request: all its answers, or, in a delta, those that have something new.

    prompt_logprobs: by token id, of each token of the prompt, None of those that were not asked for; None if none was.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int
    metrics: RequestMetrics
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None


class Processed(NamedTuple):
    """Outputs, of each request once; and ids of sequences that a stop string ended, which the engine aborts."""

    outputs: list[RequestOutput]
    stopped: list[int]


class OutputProcessor:
    """The requests that the engine works on, by sequence."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._answers: dict[int, _Answer] = {}
        self._requests: dict[str, _Request] = {}

    def add(
        self, request_id: str, prompt: str | None, prompt_token_ids: list[int], params: SamplingParams,
        sequence_ids: Sequence[int], *, now: float, is_streamed: bool,
    ) -> None:  # fmt: skip
        """A request, with the sequence of each of its answers. is_streamed: outputs are deltas, one for each step."""
        assert request_id not in self._requests, f"request {request_id} twice"
        request = _Request(request_id, prompt, prompt_token_ids, now, is_streamed)
        for index, sequence_id in enumerate(sequence_ids):
            answer = _Answer(index, sequence_id, request, params, self._tokenizer)
            request.answers.append(answer)
            request.num_unfinished += 1
            self._answers[sequence_id] = answer
        self._requests[request_id] = request

    def process(self, new_tokens: Iterable[NewToken], *, now: float) -> Processed:
        """What the new tokens make certain; a request's last output is `finished`, after which it is forgotten."""
        touched: dict[str, _Request] = {}
        stopped = []
        for token in new_tokens:
            answer = self._answers[token.sequence_id]
            answer.add(token)
            answer.request.saw_token(token, now, self._tokenizer)
            touched[answer.request.request_id] = answer.request
            if answer.finish_reason is not None:
                answer.request.num_unfinished -= 1
                del self._answers[token.sequence_id]
                if token.finish is None:
                    stopped.append(token.sequence_id)
        for request in touched.values():
            if request.num_unfinished == 0:
                del self._requests[request.request_id]
        ready = [
            request for request in touched.values() if request.is_streamed or request.num_unfinished == 0
        ]
        return Processed([request.output(now) for request in ready], stopped)

    def abort(self, request_id: str) -> list[int]:
        """Forget a request; the ids of its sequences that the engine still works on, none if it has ended."""
        request = self._requests.pop(request_id, None)
        ids = (
            []
            if request is None
            else [each.sequence_id for each in request.answers if each.finish_reason is None]
        )
        for sequence_id in ids:
            del self._answers[sequence_id]
        return ids


class _Request:
    """A request while the engine works on it."""

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        arrival: float,
        is_streamed: bool,
    ) -> None:
        self.request_id = request_id
        self.is_streamed = is_streamed
        self.answers: list[_Answer] = []
        self.num_unfinished = 0
        self._prompt = prompt
        self._prompt_token_ids = prompt_token_ids
        self._arrival = arrival
        self._first_token: float | None = None
        self._num_cached_tokens = 0
        self._prompt_logprobs: list[dict[int, Logprob] | None] | None = None

    def saw_token(self, token: NewToken, now: float, tokenizer: Tokenizer) -> None:
        """A token of one of its answers came."""
        if self._first_token is not None:
            return
        self._first_token, self._num_cached_tokens = now, token.num_cached_tokens
        if token.prompt_logprobs:
            num_without = len(self._prompt_token_ids) - len(token.prompt_logprobs)
            scored = zip(self._prompt_token_ids[num_without:], token.prompt_logprobs, strict=True)
            self._prompt_logprobs = [None] * num_without
            self._prompt_logprobs += [_by_token(token_id, each, tokenizer) for token_id, each in scored]

    def output(self, now: float) -> RequestOutput:
        """What is new, or, of one that is not streamed, everything."""
        is_finished = self.num_unfinished == 0
        return RequestOutput(
            request_id=self.request_id,
            prompt=self._prompt,
            prompt_token_ids=self._prompt_token_ids,
            outputs=[answer.take() for answer in self.answers if answer.is_new],
            finished=is_finished,
            num_cached_tokens=self._num_cached_tokens,
            metrics=RequestMetrics(self._arrival, self._first_token, now if is_finished else None),
            prompt_logprobs=self._prompt_logprobs,
        )


class _Answer:
    """One sequence of a request, and what of it has not been given out."""

    def __init__(
        self, index: int, sequence_id: int, request: _Request, params: SamplingParams, tokenizer: Tokenizer
    ) -> None:
        self.sequence_id = sequence_id
        self.request = request
        self.token_ids: list[int] = []
        self.is_new = False  # something has come since `take`
        self.finish_reason: FinishReason | None = None
        self._index = index
        self._params = params
        self._tokenizer = tokenizer
        self._detokenizer = tokenizer.detokenizer(skip_special_tokens=params.skip_special_tokens)
        self._stops = StopStrings(params.stop, are_included=params.include_stop_str_in_output)
        self._num_tokens = 0
        self._pieces: list[str] = []
        self._logprobs: list[dict[int, Logprob]] = []
        self._cumulative_logprob = 0.0
        self._stop_reason: str | int | None = None

    def add(self, token: NewToken) -> None:
        """One token on; ends the answer if the engine says so, or if its text reaches a stop string."""
        self.is_new = True
        self.finish_reason = token.finish
        if token.token_id is not None and self._params.max_tokens:
            self._add_token(token, token.token_id)
        if token.finish is not None and not isinstance(self._stop_reason, str):
            self._add_text(self._detokenizer.flush())
            if not isinstance(self._stop_reason, str):
                self._pieces.append(self._stops.flush())

    def _add_token(self, token: NewToken, token_id: int) -> None:
        self._num_tokens += 1
        self.token_ids.append(token_id)
        if token.logprobs is not None:
            self._add_logprobs(token_id, token.logprobs)
        if token.finish is FinishReason.STOP and token_id in self._params.stop_token_ids:
            self._stop_reason = token_id
        if token.finish is not FinishReason.STOP or self._params.include_stop_str_in_output:
            self._add_text(self._detokenizer.add(token_id))

    def take(self) -> CompletionOutput:
        """What is new, which is then given out."""
        wants_logprobs = self._params.logprobs is not None
        output = CompletionOutput(
            index=self._index,
            text="".join(self._pieces),
            token_ids=self.token_ids,
            finish_reason=self.finish_reason,
            stop_reason=self._stop_reason,
            logprobs=self._logprobs if wants_logprobs else None,
            cumulative_logprob=self._cumulative_logprob if wants_logprobs else None,
        )
        self.token_ids, self._pieces, self._logprobs = [], [], []
        self.is_new = False
        return output

    def _add_text(self, piece: str) -> None:
        found = None
        if self._num_tokens > self._params.min_tokens:
            piece, found = self._stops.add(piece)
        self._pieces.append(piece)
        if found is not None:
            self.finish_reason, self._stop_reason = FinishReason.STOP, found

    def _add_logprobs(self, token_id: int, logprobs: TokenLogprobs) -> None:
        self._cumulative_logprob += logprobs.logprob
        self._logprobs.append(_by_token(token_id, logprobs, self._tokenizer))


def _by_token(token_id: int, logprobs: TokenLogprobs, tokenizer: Tokenizer) -> dict[int, Logprob]:
    """Of a token and of those that were likeliest in its place."""
    likeliest = zip(logprobs.top_ids, logprobs.top_logprobs, strict=True)
    each = {other: (value, rank) for rank, (other, value) in enumerate(likeliest, start=1)}
    each.setdefault(token_id, (logprobs.logprob, logprobs.rank))
    return {
        other: Logprob(value, rank, tokenizer.decode_one(other, skip_special_tokens=False))
        for other, (value, rank) in each.items()
    }
