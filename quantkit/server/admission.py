"""How much may wait. What is beyond it is told so at once, with a guess of when to come back."""

import time
from collections import deque

from quantkit.server.errors import invalid, overloaded

PACE = 32  # ends of sequences that the pace is taken from
MOST_SECONDS = 60


class Admission:
    """Counts what the engine was given. max_sequences: that run or wait, together.

    max_waiting_tokens: of prompts of requests that have not begun; one prompt may always wait, however long.
    """

    def __init__(self, *, max_sequences: int, max_waiting_tokens: int) -> None:
        self._max_sequences = max_sequences
        self._max_waiting_tokens = max_waiting_tokens
        self.num_sequences = 0
        self.num_waiting_tokens = 0
        self._ends: deque[float] = deque(maxlen=PACE)

    def admit(self, num_sequences: int, num_prompt_tokens: int) -> None:
        """Count a request in. Raises ApiError: a 429 if too much waits, a 400 if it never fits."""
        if num_sequences > self._max_sequences:
            raise invalid(
                f"{num_sequences} answers in one request, of all its prompts together; this server takes at most "
                f"{self._max_sequences}",
                param="n",
            )
        if self.num_sequences + num_sequences > self._max_sequences:
            raise overloaded("too many requests wait for their turn", retry_after=self._retry_after())
        num_waiting = self.num_waiting_tokens + num_prompt_tokens
        if self.num_waiting_tokens and num_waiting > self._max_waiting_tokens:
            raise overloaded(
                "too many tokens of prompts wait for their turn", retry_after=self._retry_after()
            )
        self.num_sequences += num_sequences
        self.num_waiting_tokens = num_waiting

    def begun(self, num_prompt_tokens: int) -> None:
        """A prompt waits no longer, be it that it is computed or that nobody wants it."""
        self.num_waiting_tokens -= num_prompt_tokens

    def ended(self, num_sequences: int) -> None:
        """Sequences run or wait no longer."""
        self.num_sequences -= num_sequences
        self._ends.extend([time.monotonic()] * num_sequences)
        if not self.num_sequences:  # time without work says nothing of the pace
            self._ends.clear()

    def _retry_after(self) -> int:
        """Seconds until some of what waits will have ended, at the pace of the last ends."""
        if len(self._ends) < 2:
            return 1
        seconds = (time.monotonic() - self._ends[0]) / len(self._ends)
        return min(1 + int(seconds), MOST_SECONDS)
