"""Size against loss, all candidates in one drawing, with the line of those that no other beats in both."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from quantkit.evaluation.page.figures import measured, names, nats, nats_range, size
from quantkit.evaluation.page.html import Html, element, folded, note, section, table
from quantkit.evaluation.page.plot import LinearScale, LogScale, drawing, line, words
from quantkit.evaluation.report import EvalReport

HEIGHT, TOP, BOTTOM = 340, 14, 300  # pixels; between the last two is the plot
NARROW = 330  # pixels of a phone's plot, in which labels must not meet
LETTER, LABEL_HEIGHT = 6.6, 15
ORIGINAL = "original"


class _Point(NamedTuple):
    name: str
    num_bytes: int
    kl: float
    interval: tuple[float, float] | None


class _Label(NamedTuple):
    left: float
    y: float
    width: float


def pareto(report: EvalReport) -> Html | None:
    """Nothing if there is no candidate with figures."""
    points = _points(report)
    if not points:
        return None
    floor = report.reference.kl_noise_floor
    rows = [
        (point.name, size(point.num_bytes), f"{bits:.2f}", nats(point.kl), nats_range(point.interval))
        for point, bits in zip(points, (c.bits_per_weight for c in measured(report)), strict=True)
    ]
    return section(
        "pareto",
        "Size and loss",
        element("div", _drawing(report, points, floor), class_="plot"),
        note(
            "Lower and further left is better. Bars are 95 % intervals of the mean over whole windows; the stepped "
            "line joins candidates that no other beats in both. The dashed line is what computing the original in "
            f"{report.reference.dtype} costs by itself.",
        ),
        folded(
            "These figures as a table",
            table(
                ("candidate", "size", "bits per weight", "KL", "95 %"), rows, "Size and KL of all candidates"
            ),
            on_paper=True,
        ),
    )


def _points(report: EvalReport) -> list[_Point]:
    called = names(report)
    return [
        _Point(called[candidate.path], candidate.bytes, candidate.damage.kl_mean, candidate.damage.kl_ci)
        for candidate in measured(report)
        if candidate.damage is not None
    ]


def _drawing(report: EvalReport, points: Sequence[_Point], floor: float) -> Html:
    kls = [value for point in points for value in (point.kl, *(point.interval or ())) if value > 0]
    kls += [floor] if floor else []
    y_scale = LogScale(min(kls, default=1e-6) / 2, max(kls, default=1) * 2)
    x_scale = LinearScale(0, max(report.reference.bytes, *(point.num_bytes for point in points)) * 1.08)
    frontier = _frontier(points)
    return drawing(
        "Size against KL divergence",
        "; ".join(f"{point.name}: {size(point.num_bytes)}, KL {nats(point.kl)}" for point in points),
        HEIGHT,
        _axes(x_scale, y_scale),
        _noise(report, floor, y_scale) if floor else None,
        _steps([_place(point, x_scale, y_scale) for point in frontier]),
        [_mark(point, x_scale, y_scale, is_best=point in frontier) for point in points],
        _original(report, x_scale, y_scale) if floor else None,
        _labels(points, x_scale, y_scale, *([_original_label(report, x_scale, y_scale)] if floor else [])),
    )


def _frontier(points: Sequence[_Point]) -> list[_Point]:
    """By size; each loses less than all that are smaller."""
    best: list[_Point] = []
    for point in sorted(points, key=lambda point: (point.num_bytes, point.kl)):
        if not best or point.kl < best[-1].kl:
            best.append(point)
    return best


def _place(point: _Point, x_scale: LinearScale, y_scale: LogScale) -> tuple[float, float]:
    return x_scale.at(point.num_bytes), _y(point.kl, y_scale)


def _y(kl: float, scale: LogScale) -> float:
    return BOTTOM - (BOTTOM - TOP) * scale.at(kl)


def _axes(x_scale: LinearScale, y_scale: LogScale) -> list[Html]:
    grid = [line(0, _y(tick, y_scale), 1, _y(tick, y_scale), "grid") for tick in y_scale.ticks()]
    y_words = [words(0, _y(tick, y_scale) + 4, f"{tick:g}", dx=-8, anchor="end") for tick in y_scale.ticks()]
    x_words = [
        words(x_scale.at(tick), BOTTOM + 18, size(round(tick)) if tick else "0", anchor="middle")
        for tick in x_scale.ticks()
    ]
    titles = [
        words(0, TOP - 3, "KL, nats", "axis"),
        words(1, BOTTOM + 36, "size of all tensors", "axis", anchor="end"),
    ]
    return [*grid, line(0, BOTTOM, 1, BOTTOM, "rule"), *y_words, *x_words, *titles]


def _noise(report: EvalReport, floor: float, y_scale: LogScale) -> list[Html]:
    y = _y(floor, y_scale)
    return [
        line(0, y, 1, y, "noise"),
        words(0, y + 15, f"noise of {report.reference.dtype}: {nats(floor)}", "quiet", dx=4),
    ]


def _original(report: EvalReport, x_scale: LinearScale, y_scale: LogScale) -> list[Html]:
    """In 16 bits: what it loses against itself in float32."""
    x, y = x_scale.at(report.reference.bytes), _y(report.reference.kl_noise_floor, y_scale)
    mark = element("circle", cx=f"{100 * x:.3f}%", cy=y, r=5, class_="hollow")
    return [mark, words(x, y - 12, ORIGINAL, "quiet", anchor="end", dx=6)]


def _original_label(report: EvalReport, x_scale: LinearScale, y_scale: LogScale) -> _Label:
    width = LETTER * len(ORIGINAL)
    left = x_scale.at(report.reference.bytes) * NARROW + 6 - width
    return _Label(left, _y(report.reference.kl_noise_floor, y_scale) - 16, width)


def _steps(places: Sequence[tuple[float, float]]) -> list[Html]:
    """Right along the loss of one, then down to the next."""
    found = []
    for (x1, y1), (x2, y2) in pairwise(places):
        found += [line(x1, y1, x2, y1, "frontier"), line(x2, y1, x2, y2, "frontier")]
    return found


def _mark(point: _Point, x_scale: LinearScale, y_scale: LogScale, *, is_best: bool) -> Html:
    x, y = _place(point, x_scale, y_scale)
    low, high = (_y(value, y_scale) for value in point.interval or (point.kl, point.kl))
    title = f"{point.name}: {size(point.num_bytes)}, KL {nats(point.kl)} ({nats_range(point.interval)})"
    dot = element("circle", cx=f"{100 * x:.3f}%", cy=y, r=5, class_="dot" if is_best else "dot beaten")
    return element("g", element("title", title), line(x, low, x, high, "whisker"), dot)


def _labels(points: Sequence[_Point], x_scale: LinearScale, y_scale: LogScale, *others: _Label) -> list[Html]:
    """Beside their marks, moved up or down until they meet neither each other nor a mark, on a narrow screen either."""
    places = [_place(point, x_scale, y_scale) for point in points]
    taken = [*others, *(_Label(x * NARROW - 6, y, 12) for x, y in places)]
    found = []
    for point, (x, y) in zip(points, places, strict=True):
        is_left = x > 0.5
        width = LETTER * len(point.name)
        left = x * NARROW + (-10 - width if is_left else 10)
        offsets = (sign * LABEL_HEIGHT * step / 2 for step in range(30) for sign in (-1, 1))
        moved = next(dy for dy in offsets if _is_free(_Label(left, y + dy, width), taken))
        taken.append(_Label(left, y + moved, width))
        anchor, dx = ("end", -10) if is_left else ("start", 10)
        found.append(words(x, y + moved + 4, point.name, "label", dx=dx, anchor=anchor))
    return found


def _is_free(label: _Label, taken: Sequence[_Label]) -> bool:
    if not TOP < label.y < BOTTOM:
        return False
    return all(
        abs(label.y - other.y) >= LABEL_HEIGHT
        or label.left + label.width <= other.left
        or other.left + other.width <= label.left
        for other in taken
    )
