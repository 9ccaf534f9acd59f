"""One answer as it comes: written to stdout, counted and timed."""

import sys
import time
from typing import TYPE_CHECKING, Any

import typer

from quantkit.errors import GenerationError

if TYPE_CHECKING:
    from quantkit.runtime.outputs import RequestOutput

REASONS = {
    None: "stopped",
    "stop": "the model ended",
    "length": "--max-tokens reached",
    "context": "the context is full",
    "error": "the model's logits were no numbers",
}


class Answer:
    """Text, tokens and times so far. writes: whether the text goes to stdout as it comes."""

    def __init__(self, num_prompt_tokens: int, *, writes: bool) -> None:
        self.text = ""
        self._token_ids: list[int] = []
        self._finish: str | None = None
        self._num_prompt_tokens = num_prompt_tokens
        self._writes = writes
        self._started = self._first = self._last = time.perf_counter()

    def add(self, output: "RequestOutput") -> None:
        """What is new of the only answer to a request."""
        (answer,) = output.outputs
        self._last = time.perf_counter()
        if not self._token_ids:
            self._first = self._last
        self._token_ids += answer.token_ids
        self._finish = answer.finish_reason
        self.text += answer.text
        if self._writes:
            sys.stdout.write(answer.text)
            sys.stdout.flush()

    def check(self) -> None:
        """Raise GenerationError if the model could not go on."""
        if self._finish == "error":
            raise GenerationError(
                "the model's logits are not numbers (NaN): its weights are damaged, or overflow in this dtype",
                fix="run `quantkit verify` on the folder, or try --dtype float32",
            )

    def as_dict(self) -> dict[str, Any]:
        """Everything, for a program to read."""
        rate = self._rate()
        return {
            "text": self.text,
            "token_ids": self._token_ids,
            "finish": self._finish,
            "prompt_tokens": self._num_prompt_tokens,
            "prefill_seconds": round(self._first - self._started, 4),
            "decode_seconds": round(self._last - self._first, 4),
            "tokens_per_second": None if rate is None else round(rate, 2),
        }

    def summary(self) -> str:
        """The speed, and why it ended, in a line."""
        rate = self._rate()
        pace = "" if rate is None else f" at {rate:.2f} tok/s"
        return (
            f"{self._num_prompt_tokens} prompt tokens in {self._first - self._started:.2f} s, "
            f"{len(self._token_ids)} new{pace}; {REASONS[self._finish]}"
        )

    def _rate(self) -> float | None:
        """Tokens a second, after the first."""
        seconds = self._last - self._first
        return (len(self._token_ids) - 1) / seconds if seconds > 0 else None


def to_stderr(line: str) -> None:
    """A line that is no result."""
    typer.echo(line, err=True)
