"""What a weight format needs for every number of rows: its routes, from few rows to many.

A family keeps a weight once, in one layout (`prepare`), which all of its routes read. Which route computes is
`dispatch`'s to say; a route says only what it can.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One way to compute. run(x, operand, **more) -> y; max_rows: the largest M it takes, None: any."""

    name: str
    run: Callable[..., Tensor]
    max_rows: int | None = None
    min_capability: tuple[int, int] = (8, 0)
    max_capability: tuple[int, int] | None = None  # where it uses one architecture's own instructions


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """routes: the last one takes any M on every device that the family is for.

    weight_bytes: per weight, for the bound of a product. input_dtype: of x; None: bf16 or fp16.
    """

    name: str
    routes: tuple[Route, ...]
    prepare: Callable[..., Any]
    weight_bytes: float
    input_dtype: Any = None

    def usable(self, num_rows: int, capability: tuple[int, int]) -> tuple[Route, ...]:
        """The routes that take this many rows on a device of this capability."""
        return tuple(
            route
            for route in self.routes
            if (route.max_rows is None or num_rows <= route.max_rows)
            and route.min_capability <= capability
            and (route.max_capability is None or capability <= route.max_capability)
        )
