"""Drawings whose width is the screen's: x is in percent of it, y in pixels, so that text and marks keep their size."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from quantkit.evaluation.page.html import Child, Html, element


class LogScale(NamedTuple):
    """Values to 0 … 1 by their logarithm."""

    low: float
    high: float

    def at(self, value: float) -> float:
        """Below `low` is 0."""
        span = math.log(self.high / self.low)
        return max(0.0, math.log(max(value, self.low) / self.low) / span)

    def ticks(self) -> list[float]:
        """Powers of ten inside; with fewer than three, also 2 and 5 times them."""
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        steps = (1,) if last - first > 3 else (1, 2, 5)
        found = [step * 10.0**power for power in range(first, last + 1) for step in steps]
        return [tick for tick in found if self.low <= tick <= self.high * 1.0001]


class LinearScale(NamedTuple):
    """Values to 0 … 1, proportionally."""

    low: float
    high: float

    def at(self, value: float) -> float:
        """Not limited to 0 … 1."""
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Four or so round values inside."""
        rough = (self.high - self.low) / 4
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(step * power for step in (1, 2, 5, 10) if step * power >= rough)
        first = math.ceil(self.low / step)
        return [number * step for number in range(first, math.floor(self.high / step) + 1)]


def drawing(title: str, description: str, height: float, *children: Child, class_: str = "") -> Html:
    """An SVG of all the width there is."""
    return element(
        "svg",
        element("title", title),
        element("desc", description),
        *children,
        role="img",
        width="100%",
        height=height,
        class_=class_ or None,
    )


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Html:
    """x in 0 … 1, y in pixels."""
    return element("line", x1=f"{100 * x1:.3f}%", y1=y1, x2=f"{100 * x2:.3f}%", y2=y2, class_=class_)


def words(
    x: float, y: float, content: str, class_: str = "", *, dx: float = 0, anchor: str = "start"
) -> Html:
    """A label; dx in pixels."""
    return element(
        "text", content, x=f"{100 * x:.3f}%", y=y, dx=dx or None, text_anchor=anchor, class_=class_ or None
    )


def bars(rows: Sequence[tuple[str, float, str]], label: str) -> Html:
    """A horizontal bar for each (name, value, value as shown); the longest is the largest."""
    largest = max((value for _, value, _ in rows), default=0) or 1
    items = [
        element(
            "li",
            element("span", name, class_="name"),
            element("span", class_="bar", style=f"--v:{max(value, 0) / largest:.4f}"),
            element("span", shown, class_="value"),
        )
        for name, value, shown in rows
    ]
    return element("ul", items, class_="bars", aria_label=label)
