"""What a run tells of its progress."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from quantkit.recipe import LinearPlan


class Step(NamedTuple):
    """One tensor done. linear: the plan if it was quantized; note: what quantkit.json says of it."""

    name: str
    done_bytes: int
    total_bytes: int
    linear: LinearPlan | None
    note: Mapping[str, Any]
