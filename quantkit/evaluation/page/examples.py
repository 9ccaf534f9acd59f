"""The positions where original and candidate are furthest apart, and how each goes on."""

from collections.abc import Sequence

from quantkit.evaluation.page.figures import measured, names, nats
from quantkit.evaluation.page.html import Html, element, folded, note, section
from quantkit.evaluation.report import EvalReport, WorstExample

NUM_OPEN = 2  # of a candidate; the others are folded


def examples(report: EvalReport) -> Html | None:
    """Nothing if none were asked for."""
    called = names(report)
    shown = [(called[c.path], c.worst) for c in measured(report) if c.worst]
    if not shown:
        return None
    return section(
        "worst",
        "The worst positions",
        note(
            "The text before the position of largest KL in a window at which the likeliest tokens differ, and what "
            "each model writes there, always taking the likeliest. What they write alike is faint."
        ),
        [
            [element("h3", name), _cards(name, worst[:NUM_OPEN]), _more(name, worst[NUM_OPEN:])]
            for name, worst in shown
        ],
    )


def _cards(name: str, worst: Sequence[WorstExample]) -> Html:
    return element("div", [_example(name, one) for one in worst], class_="examples")


def _more(name: str, worst: Sequence[WorstExample]) -> Html | None:
    return folded(f"{len(worst)} more", _cards(name, worst), on_paper=True) if worst else None


def _example(name: str, example: WorstExample) -> Html:
    same = _num_alike(example.reference, example.candidate)
    sides = (("original", example.reference), (name, example.candidate))
    return element(
        "article",
        element("p", f"KL {nats(example.kl)}", class_="kl"),
        element("p", "… ", example.context, class_="said context", dir="auto"),
        element("div", [_side(label, written, same) for label, written in sides], class_="sides"),
        class_="card",
    )


def _num_alike(first: str, second: str) -> int:
    """Characters from the beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(first), len(second)))


def _side(label: str, written: str, same: int) -> Html:
    said = element(
        "p",
        element("span", written[:same], class_="same"),
        element("mark", written[same:]),
        class_="said",
        dir="auto",
    )
    return element("div", element("h5", label), said)
