"""Objectives for latency: what a request has to keep to count as served well."""

import re
from typing import NamedTuple

from quantkit.bench.arrivals import Arrivals
from quantkit.errors import BenchError

UNITS = {"ms": 1e-3, "s": 1.0}
FIX = "write it like ttft=200ms,tpot=30ms, of ttft, tpot and e2e, in ms or s"


class Slo(NamedTuple):
    """At most so many seconds; None: as long as it takes."""

    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None

    def is_met(self, arrivals: Arrivals, seconds: float) -> bool:
        """Whether one answer kept it. seconds: of all of it."""
        found = (arrivals.ttft, arrivals.tpot, seconds)
        return all(
            most is None or value is None or value <= most for most, value in zip(self, found, strict=True)
        )


def parse_slo(text: str) -> Slo:
    """An objective as a user writes it. Raises BenchError."""
    limits: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s)", value)
        if match is None or name not in Slo._fields or name in limits:
            raise BenchError(f"--slo {text}: {part.strip() or 'nothing'} is no objective", fix=FIX)
        limits[name] = float(match[1]) * UNITS[match[2]]
    return Slo(**limits)
