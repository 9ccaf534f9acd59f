"""How the KL is spread over positions: a histogram for each candidate, all on one axis."""

from itertools import pairwise

from quantkit.evaluation.page.figures import names, nats, percent
from quantkit.evaluation.page.html import Html, element, folded, note, section, table
from quantkit.evaluation.page.plot import LogScale, drawing, line, words
from quantkit.evaluation.report import CandidateReport, Damage, EvalReport

HEIGHT = 60


def distribution(report: EvalReport) -> Html | None:
    """Nothing if no candidate has a histogram."""
    called = names(report)
    shown = [(called[c.path], c, c.damage) for c in report.candidates if c.damage and c.kl_histogram]
    if not shown:
        return None
    highest = max(max(counts) / sum(counts) for _, c, _ in shown for _, counts in [_histogram(c)])
    rows = [
        element(
            "div",
            element("h3", name, " ", element("small", _said(damage))),
            _drawing(name, c, damage, highest),
            class_="ridge",
        )
        for name, c, damage in shown
    ]
    return section(
        "distribution",
        "How the loss is spread",
        element("div", rows, _axis(shown[0][1]), class_="plot"),
        note(
            "Share of positions by their own KL, on a logarithmic axis. The lines are the mean and, dotted, the median "
            "and the 99th percentile. A mean far right of its median comes from few positions."
        ),
        folded("These figures as tables", [_table(name, candidate) for name, candidate, _ in shown]),
    )


def _histogram(candidate: CandidateReport) -> tuple[tuple[float, ...], tuple[int, ...]]:
    assert candidate.kl_histogram is not None, "only those that have one are shown"
    return candidate.kl_histogram


def _bins(edges: tuple[float, ...], counts: tuple[int, ...]) -> list[tuple[float, float, int]]:
    return [(low, high, count) for (low, high), count in zip(pairwise(edges), counts, strict=True)]


def _scale(edges: tuple[float, ...]) -> LogScale:
    """The first bin starts at 0, which has no logarithm: it is as wide as the second."""
    return LogScale(edges[1] ** 2 / edges[2], edges[-1])


def _drawing(name: str, candidate: CandidateReport, damage: Damage, highest: float) -> Html:
    edges, counts = _histogram(candidate)
    scale, total = _scale(edges), sum(counts)
    bins = [
        element(
            "rect",
            element("title", f"{nats(low)} to {nats(high)}: {percent(count / total)}"),
            x=f"{100 * scale.at(low):.3f}%",
            width=f"{100 * (scale.at(high) - scale.at(low)):.3f}%",
            y=HEIGHT - (height := (HEIGHT - 4) * count / total / highest),
            height=height,
            class_="bin",
        )
        for low, high, count in _bins(edges, counts)
        if count
    ]
    marks = [
        line(scale.at(kl), 2, scale.at(kl), HEIGHT, f"mark {name}") for name, kl in _marks(damage).items()
    ]
    return drawing(f"KL of {name} over positions", _said(damage), HEIGHT, bins, marks)


def _said(damage: Damage) -> str:
    return " · ".join(f"{name} {nats(kl)}" for name, kl in _marks(damage).items())


def _marks(damage: Damage) -> dict[str, float]:
    return {"median": damage.kl_median, "mean": damage.kl_mean, "p99": damage.kl_p99}


def _axis(candidate: CandidateReport) -> Html:
    edges, _ = _histogram(candidate)
    scale = _scale(edges)
    ticks = [words(scale.at(tick), 14, f"{tick:g}", anchor="middle") for tick in scale.ticks()[::2]]
    title = words(1, 32, "KL, nats", "axis", anchor="end")
    return drawing("Axis", "KL in nats, logarithmic", 36, line(0, 0, 1, 0, "rule"), ticks, title)


def _table(name: str, candidate: CandidateReport) -> Html:
    edges, counts = _histogram(candidate)
    rows = [
        (f"{nats(low)} to {nats(high)}", f"{count:,}", percent(count / sum(counts)))
        for low, high, count in _bins(edges, counts)
    ]
    return table(("KL", "positions", "share"), rows, f"KL of {name} over positions")
