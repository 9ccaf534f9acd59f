"""What the HTTP process and the engine process say to each other, and its bytes: msgpack, never pickle.

A message is a NamedTuple of what msgpack knows, on the wire `[tag, *fields]`. Both ends are ours and start together, so
there is one version of all of this, and what arrives is what was sent.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import msgpack


class Start(NamedTuple):
    """To the engine process, first. model: a checkpoint folder. settings: fields of `EngineSettings`."""

    model: str
    settings: dict[str, Any]


class Submit(NamedTuple):
    """One prompt and its `n` answers. params: fields of `SamplingParams`."""

    request_id: str
    prompt_ids: list[int]
    params: dict[str, Any]


class Abort(NamedTuple):
    """Nobody wants the rest of a request; it may have ended already."""

    request_id: str


class Ping(NamedTuple):
    """Take a step, be there nothing to do: what it brings is a sign of life."""


class Progress(NamedTuple):
    """A line of what loading has found out."""

    line: str


class Ready(NamedTuple):
    """The engine takes requests. seconds: of each part of the start."""

    pid: int
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    num_kv_tokens: int
    block_size: int
    device: str
    seconds: dict[str, float]


class CannotStart(NamedTuple):
    """What a QuantkitError said while the engine was made."""

    problem: str
    fix: str


class Refused(NamedTuple):
    """The engine does not take a request; it is forgotten."""

    request_id: str
    problem: str
    fix: str


class Failed(NamedTuple):
    """The engine had to give up a request, so that others can go on."""

    request_id: str
    problem: str


class ChosenToken(NamedTuple):
    """A token's text, or bytes where it is no whole character, and log probability.

    likeliest: the same of as many as asked for, then of the token itself if it is not of them.
    """

    text: str | bytes
    logprob: float
    likeliest: list[tuple[str | bytes, float]]


class Choice(NamedTuple):
    """What is new of one answer. number: OpenAI's `index`. tokens: if log probabilities are asked for."""

    number: int
    text: str
    num_tokens: int
    finish_reason: str | None
    stop_reason: str | int | None
    tokens: list[ChosenToken] | None


class Delta(NamedTuple):
    """What is new of a request. num_cached_tokens: of its prompt. Times by the system's monotonic clock."""

    request_id: str
    choices: list[Choice]
    is_finished: bool
    num_cached_tokens: int
    first_token_time: float | None


class Stats(NamedTuple):
    """Of the engine as a whole. Prefix queries and hits are tokens of prompts, counted since the start."""

    num_waiting: int
    num_running: int
    kv_usage: float
    num_prefix_queries: int
    num_prefix_hits: int
    num_preemptions: int


class Stepped(NamedTuple):
    """What a step brought. begun: requests that wait no longer, since `time`, by the system's monotonic clock."""

    begun: list[str]
    time: float
    deltas: list[Delta]
    stats: Stats


Message = Start | Submit | Abort | Ping | Progress | Ready | CannotStart | Refused | Failed | Stepped
KINDS: dict[str, type[Any]] = {
    kind.__name__: kind
    for kind in (Start, Submit, Abort, Ping, Progress, Ready, CannotStart, Refused, Failed)
}


def encode(message: Message) -> bytes:
    """The message's bytes. They say where they end."""
    packed: bytes = msgpack.packb([type(message).__name__, *message])
    return packed


class Decoder:
    """Bytes in pieces of any size, messages out."""

    def __init__(self) -> None:
        self._unpacker = msgpack.Unpacker(max_buffer_size=0, strict_map_key=False)  # token ids are keys, too

    def feed(self, data: bytes) -> Iterator[Message]:
        """The messages that these bytes complete."""
        self._unpacker.feed(data)
        for tag, *fields in self._unpacker:
            yield _stepped(*fields) if tag == Stepped.__name__ else KINDS[tag](*fields)


def _stepped(begun: list[str], time: float, deltas: list[list[Any]], stats: list[Any]) -> Stepped:
    return Stepped(begun, time, [_delta(*fields) for fields in deltas], Stats(*stats))


def _delta(request_id: str, choices: list[list[Any]], *rest: Any) -> Delta:
    return Delta(request_id, [_choice(*fields) for fields in choices], *rest)


def _choice(*fields: Any) -> Choice:
    choice = Choice(*fields)
    if choice.tokens is None:
        return choice
    return choice._replace(tokens=[ChosenToken(*each) for each in choice.tokens])
