"""Scores of tasks and probes: original and candidates as bars with intervals, what guessing scores, and flips."""

from collections.abc import Sequence

from quantkit.evaluation.page.figures import (
    DASH,
    SIGNIFICANT,
    Interval,
    is_beyond_luck,
    is_worse,
    names,
    recovery,
)
from quantkit.evaluation.page.html import Html, element, folded, note, section, table
from quantkit.evaluation.page.plot import LinearScale, drawing, line
from quantkit.evaluation.report import EvalReport, Flip, TaskComparison

GROUPS = {"probe": "Probes", "task": "Tasks"}
BAR_HEIGHT = 16
MOST_FLIPS = 40  # of a task on the page

Row = tuple[str, TaskComparison]  # a candidate's name, its scores


def skills(report: EvalReport) -> Html | None:
    """Nothing if no task was run."""
    called = names(report)
    rows = [(called[c.path], task) for c in report.candidates for task in c.tasks]
    if not rows:
        return None
    return section(
        "skills",
        "Skills",
        [_group(title, [row for row in rows if row[1].group == group]) for group, title in GROUPS.items()],
        note(
            "Bars are scores with 95 % intervals; the dashed line is what guessing scores. Beside them is recovery, in "
            "percent of the original's score, with its interval, and p where a difference is more than luck "
            f"(p < {SIGNIFICANT}, paired by item)."
        ),
        folded("These figures as a table", _table(rows), on_paper=True),
    )


def flips(report: EvalReport) -> Html | None:
    """Items that one of the two got right; nothing if there are none."""
    called = names(report)
    found = [(called[c.path], task) for c in report.candidates for task in c.tasks if task.flips]
    if not found:
        return None
    return section("flips", "Answers that flipped", [_flips(*each) for each in found])


def _group(title: str, rows: Sequence[Row]) -> list[Html]:
    keys = dict.fromkeys((task.task, task.metric) for _, task in rows)
    shown = [_task([row for row in rows if (row[1].task, row[1].metric) == key]) for key in keys]
    return [element("h3", title), element("div", shown, class_="tasks")] if shown else []


def _task(rows: Sequence[Row]) -> Html:
    _, first = rows[0]
    ends = [end for _, task in rows for end in (*task.reference_ci, *task.candidate_ci)]
    scale = LinearScale(min(0.0, *ends), max(1.0 if first.higher_is_better else 0.0, *ends))
    direction = "" if first.higher_is_better else ", lower is better"
    return element(
        "article",
        element("h4", first.task, element("small", f" {first.metric}, {first.num_items} items{direction}")),
        _original(first, scale),
        [_candidate(name, task, scale) for name, task in rows],
        class_="card",
    )


def _original(task: TaskComparison, scale: LinearScale) -> Html:
    bar = _bar("original", task.reference, task.reference_ci, task.chance, scale)
    return element(
        "div", element("span", "original", class_="name"), bar, _value(task.reference), class_="skill"
    )


def _candidate(name: str, task: TaskComparison, scale: LinearScale) -> Html:
    bar = _bar(name, task.candidate, task.candidate_ci, task.chance, scale)
    luck = element("strong", _luck(task)) if _luck(task) else None
    value = _value(task.candidate, element("small", " ", recovery(task), " ", luck))
    return element("div", element("span", name, class_="name"), bar, value, class_="skill")


def _value(score: float, remark: Html | None = None) -> Html:
    return element("span", f"{score:.3g}", remark, class_="value")


def _bar(name: str, score: float, interval: Interval, chance: float | None, scale: LinearScale) -> Html:
    low, high = (scale.at(end) for end in interval)
    middle = BAR_HEIGHT / 2
    kind = "bin original" if name == "original" else "bin"
    return drawing(
        f"{name}: {score:.3g}",
        f"95 %: {interval[0]:.3g} to {interval[1]:.3g}",
        BAR_HEIGHT,
        element(
            "rect", x="0", y=2, height=BAR_HEIGHT - 4, width=f"{100 * scale.at(score):.3f}%", class_=kind
        ),
        line(low, middle, high, middle, "whisker"),
        line(scale.at(chance), 0, scale.at(chance), BAR_HEIGHT, "noise") if chance is not None else None,
    )


def _luck(task: TaskComparison) -> str:
    """What says that a difference is no luck; nothing where it may be."""
    if not is_beyond_luck(task):
        return ""
    return f"{'worse' if is_worse(task) else 'better'}, p = {task.p_value:.2g}"


def _table(rows: Sequence[Row]) -> Html:
    head = (
        "task",
        "candidate",
        "metric",
        "items",
        "chance",
        "original",
        "candidate's",
        "recovery",
        "p",
        "test",
    )
    cells = [
        (
            *(
                task.task,
                name,
                task.metric,
                str(task.num_items),
                DASH if task.chance is None else f"{task.chance:.3g}",
            ),
            f"{task.reference:.4g} ({task.reference_ci[0]:.3g} to {task.reference_ci[1]:.3g})",
            f"{task.candidate:.4g} ({task.candidate_ci[0]:.3g} to {task.candidate_ci[1]:.3g})",
            *(recovery(task), DASH if task.p_value is None else f"{task.p_value:.2g}", task.test),
        )
        for name, task in rows
    ]
    return table(head, cells, "Scores of all tasks")


def _flips(name: str, task: TaskComparison) -> Html:
    lost = sum(flip.was_right for flip in task.flips)
    summary = (
        f"{name}, {task.task} {task.metric}: {lost} lost, {len(task.flips) - lost} gained of {task.num_items}"
    )
    chosen = sorted(task.flips, key=lambda flip: not flip.was_right)[:MOST_FLIPS]
    more = len(task.flips) - len(chosen)
    rest = note(f"{more} more are in the JSON and in the log of samples.") if more else None
    head = ("item", "", "prompt", "expected", "original", "candidate")
    return folded(summary, table(head, [_flip(flip) for flip in chosen], summary), rest)


def _flip(flip: Flip) -> tuple[str | Html, ...]:
    said = (flip.prompt, flip.target, flip.reference, flip.candidate)
    return (
        flip.item,
        "lost" if flip.was_right else "gained",
        *(element("div", words, class_="said", dir="auto") for words in said),
    )
