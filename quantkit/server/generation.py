"""What one HTTP request gets of the engine, in a buffer between the two.

The engine never waits for a client. What nobody has taken is merged, so that a reader who is behind gets fewer, larger
pieces; one who does not read at all is cut off when too much lies here.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

from quantkit.server.errors import ApiError, failed, invalid
from quantkit.server.limits import MAX_BEHIND_TOKENS, MAX_WHOLE_TOKENS
from quantkit.server.messages import Choice, Delta


class Times(NamedTuple):
    """Of the system's monotonic clock; None: it did not come to that."""

    arrival: float
    begun: float | None
    first_token: float | None
    last_token: float | None


class Generation:
    """All answers to the prompts of one request: those to prompt i are choices i · n to i · n + n − 1.

    It ends once: with the last token, or by `fail`, whatever comes first. is_streamed: pieces are taken as they come.
    number: by which the engine tells it from others. arrival: of the request, by the system's monotonic clock.
    parts: what the engine works on, one for each prompt.
    """

    def __init__(
        self,
        number: int,
        prompt_lengths: Sequence[int],
        *,
        arrival: float,
        num_answers: int,
        is_streamed: bool,
    ) -> None:
        self.is_streamed = is_streamed
        self.num_answers = num_answers
        self.num_prompt_tokens = sum(prompt_lengths)
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.finish_reasons: list[str] = []
        self.error: ApiError | None = None
        self.parts = [f"{number}-{prompt}" for prompt in range(len(prompt_lengths))]
        self.unfinished = set(self.parts)
        self.waiting = dict(zip(self.parts, prompt_lengths, strict=True))
        self._first_choice = {part: prompt * num_answers for prompt, part in enumerate(self.parts)}
        self._arrival = arrival
        self._begun: float | None = None
        self._first_token: float | None = None
        self._last_token: float | None = None
        self._pending: dict[int, list[Choice]] = {}  # by choice, what nobody has taken
        self._num_pending = 0
        self._news = asyncio.Event()

    @property
    def has_ended(self) -> bool:
        return self.error is not None or not self.unfinished

    @property
    def num_choices(self) -> int:
        return len(self.parts) * self.num_answers

    @property
    def times(self) -> Times:
        return Times(self._arrival, self._begun, self._first_token, self._last_token)

    def begin(self, part: str, now: float) -> int:
        """One of its prompts waits no longer; returns how many tokens it has."""
        self._begun = self._begun or now
        return self.waiting.pop(part)

    def put(self, delta: Delta, now: float) -> float | None:
        """What the engine has made of one of its prompts; returns the seconds since what came before, None: nothing."""
        before, self._last_token = self._last_token, now
        if before is None:
            self._first_token = now
        first_choice = self._first_choice[delta.request_id]
        for choice in delta.choices:
            self._add(choice._replace(number=first_choice + choice.number) if first_choice else choice)
        if delta.is_finished:
            self.unfinished.discard(delta.request_id)
            self.num_cached_tokens += delta.num_cached_tokens
        if self.is_streamed or self.has_ended:
            self._news.set()
        return None if before is None else now - before

    def fail(self, error: ApiError) -> None:
        """End it with an error, unless it has ended."""
        if not self.has_ended:
            self.error = error
            self._news.set()

    async def pieces(self) -> AsyncIterator[list[Choice]]:
        """What is new, each time that there is something; of one that is not streamed, all at once.

        Raises the ApiError that it ended with.
        """
        while True:
            await self._news.wait()
            self._news.clear()
            if self.error is not None:
                raise self.error
            pending, self._pending, self._num_pending = self._pending, {}, 0
            has_ended = self.has_ended
            yield [_merged(pending[index]) for index in sorted(pending)]
            if has_ended:
                return

    def _add(self, new: Choice) -> None:
        self.num_tokens += new.num_tokens
        if new.finish_reason is not None:
            self.finish_reasons.append(new.finish_reason)
        if new.finish_reason == "error":
            self.fail(failed("the model's logits were not numbers (NaN)", "model_error"))
        if new.finish_reason == "grammar":
            self.fail(invalid("the answer's grammar takes too long to follow; give a simpler one"))
        self._pending.setdefault(new.number, []).append(new)
        self._num_pending += new.num_tokens + sum(len(token.likeliest) for token in new.tokens or ())
        if self._num_pending > (MAX_BEHIND_TOKENS if self.is_streamed else MAX_WHOLE_TOKENS):
            self._cut_off()

    def _cut_off(self) -> None:
        self._pending.clear()
        if self.is_streamed:
            self.fail(ApiError(408, "the client does not read the stream", code="slow_client"))
        else:
            self.fail(invalid("the answers and their log probabilities are too many to be sent at once"))


def _merged(pieces: list[Choice]) -> Choice:
    """Pieces of one choice as one."""
    last = pieces[-1]
    if len(pieces) == 1:
        return last
    tokens = None if last.tokens is None else [token for piece in pieces for token in piece.tokens or ()]
    text = "".join(piece.text for piece in pieces)
    return last._replace(text=text, num_tokens=sum(piece.num_tokens for piece in pieces), tokens=tokens)
