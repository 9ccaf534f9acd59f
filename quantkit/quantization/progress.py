"""What a run tells of its progress."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from quantkit.recipe import LinearPlan


class Step(NamedTuple):
    """One tensor done. linear: the plan if it was quantized; note: what quantkit.json says of it.

    phase: a run with data goes over its linears first, and then writes everything. Bytes count within the phase.
    """

    name: str
    phase: Literal["calibrating", "writing"]
    done_bytes: int
    total_bytes: int
    seconds: float
    linear: LinearPlan | None
    note: Mapping[str, Any]
