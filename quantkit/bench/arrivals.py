"""When the tokens of one request came, and what follows from that. Knows neither engines nor servers.

submitted ──────── first token ── token ── … ── last token
    |─── TTFT ──────────|── ITL ──|
                        |────── TPOT · (tokens − 1) ──────|
"""

import statistics
from typing import NamedTuple

PERCENTILES = (50, 90, 99)


class Arrivals(NamedTuple):
    """Of one request: seconds from submission to each moment that brought tokens, of which it may bring several."""

    num_prompt_tokens: int
    num_output_tokens: int
    seconds: tuple[float, ...]

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.seconds[0]

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first; None with one token."""
        if self.num_output_tokens < 2:
            return None
        return (self.seconds[-1] - self.seconds[0]) / (self.num_output_tokens - 1)

    @property
    def gaps(self) -> list[float]:
        """Seconds between moments that follow each other."""
        return [later - earlier for earlier, later in zip(self.seconds, self.seconds[1:], strict=False)]


def percentiles(seconds: list[float]) -> dict[int, float] | None:
    """In milliseconds, at PERCENTILES; of a few values the nearest ones; None of none."""
    if not seconds:
        return None
    if len(seconds) == 1:
        return dict.fromkeys(PERCENTILES, seconds[0] * 1e3)
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {percent: cuts[percent - 1] * 1e3 for percent in PERCENTILES}
