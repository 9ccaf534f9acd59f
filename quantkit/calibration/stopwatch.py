"""Where the seconds of calibration go."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Seconds by kind of work. Work inside other work counts once, as the inner kind.

    On a GPU every change of kind waits for it, so that seconds belong to the work that took them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._running: list[str] = []
        self._since = 0.0
        self._seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def measure(self, kind: str) -> Iterator[None]:
        """While open, time counts as this kind of work."""
        self._charge()
        self._running.append(kind)
        try:
            yield
        finally:
            self._charge()
            self._running.pop()

    def take(self) -> dict[str, float]:
        """Seconds by kind since the last call."""
        self._charge()
        taken = {kind: round(seconds, 4) for kind, seconds in self._seconds.items()}
        self._seconds.clear()
        return taken

    def _charge(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        if self._running:
            self._seconds[self._running[-1]] += now - self._since
        self._since = now
