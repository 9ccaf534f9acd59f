"""What a streamed answer of an OpenAI-compatible server brings, and when. Knows no connections."""

import json
from typing import Any, NamedTuple

from quantkit.bench.arrivals import Arrivals


class Problem(NamedTuple):
    """Why there is no answer. kind: few, to be counted; message: what the server, or the system, said."""

    kind: str
    message: str


class Events:
    """Server-sent events of one stream, line by line; usage: what the server says of its tokens, if it does."""

    def __init__(self) -> None:
        self.usage: dict[str, int] = {}
        self._moments: list[float] = []
        self._error: Problem | None = None
        self._is_done = False
        self._rest = b""

    def add(self, data: bytes, now: float) -> None:
        """Bytes of the body that came at this moment."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._add_event(line[5:].strip(), now)

    def problem(self) -> Problem | None:
        """Why the stream is no answer."""
        if self._error is None and not self._is_done:
            return Problem("cut off", "the stream ended without [DONE]")
        if self._error is None and not self._moments:
            return Problem("no answer", "the stream has no choices")
        return self._error

    def arrivals(self) -> Arrivals:
        """Of a stream that is an answer."""
        num_output_tokens = self.usage.get("completion_tokens", len(self._moments))
        return Arrivals(self.usage.get("prompt_tokens", 0), num_output_tokens, tuple(self._moments))

    def _add_event(self, event: bytes, now: float) -> None:
        if event == b"[DONE]":
            self._is_done = True
            return
        try:
            content = json.loads(event)
            if "error" in content:
                self._error = Problem("error in the stream", error_message(content))
            elif any(_brings_tokens(choice, is_first=not self._moments) for choice in content["choices"]):
                self._moments.append(now)
            self.usage = content.get("usage") or self.usage
        except (ValueError, TypeError, KeyError):
            self._error = Problem("no OpenAI event", event[:200].decode(errors="replace"))


def _brings_tokens(choice: dict[str, Any], *, is_first: bool) -> bool:
    """Whether an event has something of the answer. An answer may have tokens and no text: its end counts then."""
    if is_first and choice.get("finish_reason") is not None:
        return True
    delta = choice.get("delta")
    if delta is None:
        return bool(choice["text"])
    return any(value for name, value in delta.items() if name != "role")


def error_message(content: dict[str, Any]) -> str:
    """Of an error object, as OpenAI has it."""
    error = content["error"]
    return str(error["message"] if isinstance(error, dict) else error)
