"""The verdict: a sentence for each candidate, on its gates, on what it saves, and on what it loses beyond noise."""

import math

from quantkit.evaluation.gates import describe_failure
from quantkit.evaluation.page.figures import (
    DASH,
    is_beyond_luck,
    is_worse,
    names,
    nats,
    percent,
    recovery,
    size,
)
from quantkit.evaluation.page.html import Child, Html, element, folded
from quantkit.evaluation.report import CandidateReport, Damage, EvalReport

MARKS = {
    "meets": "✓ meets its gates",
    "misses": "✗ misses its gates",
    "broken": "✗ broken",
    "measured": "measured",
}
MOST_NAMED = 3  # scores and gates; a card of more is not read


def headline(report: EvalReport) -> str:
    """The whole page in a few words."""
    standings = [standing(report, candidate) for candidate in report.candidates]
    total = f"{len(standings)} candidate{'' if len(standings) == 1 else 's'}"
    broken = standings.count("broken")
    suffix = f", {broken} broken" if broken else ""
    if not report.gates:
        return f"{total} measured against {names(report)[report.reference.path]}, without gates{suffix}"
    return (
        f"{standings.count('meets')} of {total} met {'its' if len(standings) == 1 else 'their'} gates{suffix}"
    )


def standing(report: EvalReport, candidate: CandidateReport) -> str:
    """A key of MARKS."""
    if candidate.failure is not None:
        return "broken"
    gates = [gate for gate in report.gates if gate.candidate == candidate.path]
    return "measured" if not gates else "meets" if all(gate.passed for gate in gates) else "misses"


def verdicts(report: EvalReport) -> Html:
    """A card per candidate, in the order given."""
    return element("div", [_verdict(report, candidate) for candidate in report.candidates], class_="verdicts")


def _verdict(report: EvalReport, candidate: CandidateReport) -> Html:
    found = standing(report, candidate)
    misses = [gate for gate in report.gates if gate.candidate == candidate.path and not gate.passed]
    reasons = [element("li", describe_failure(gate).removeprefix(f"{gate.candidate}: ")) for gate in misses]
    damage = candidate.damage
    return element(
        "article",
        element("p", MARKS[found], class_=f"mark {found}"),
        element("h3", names(report)[candidate.path]),
        element(
            "p",
            f"No figures: it {candidate.failure}."
            if damage is None
            else _sentence(report, candidate, damage),
        ),
        None if damage is None else _reasons(reasons),
        class_="card",
    )


def _reasons(reasons: list[Html]) -> Child:
    if not reasons:
        return None
    shown, rest = reasons[:MOST_NAMED], reasons[MOST_NAMED:]
    more = folded(f"{len(rest)} more", element("ul", rest), on_paper=True) if rest else None
    return [element("ul", shown), more]


def _sentence(report: EvalReport, candidate: CandidateReport, damage: Damage) -> list[Child]:
    interval = "" if damage.kl_ci is None else f" ({nats(damage.kl_ci[0])}{DASH}{nats(damage.kl_ci[1])})"
    return [
        element("strong", size(candidate.bytes)),
        f" of {size(report.reference.bytes)}, at {candidate.bits_per_weight:.2f} bits per weight, loses ",
        element("strong", f"{nats(damage.kl_mean)} nats", class_="whole"),
        element("span", interval, class_="whole"),
        f", {_beside_noise(report.reference.dtype, damage)}: perplexity {damage.ppl_increase:+.1f} %, the ",
        f"same likeliest token at {percent(damage.top1)} of positions.{_tasks(candidate)}",
    ]


def _beside_noise(dtype: str, damage: Damage) -> str:
    """The loss in terms of what rounding the original's computation costs."""
    floor = damage.kl_noise_floor
    if not floor:
        return "against an original in float32"
    least = damage.kl_mean if damage.kl_ci is None else damage.kl_ci[0]
    if least <= floor:
        return f"no more than the noise of {dtype}"
    times = damage.kl_mean / floor
    return f"{times:.{0 if times >= 10 else 1}f} times the noise of {dtype}"


def _tasks(candidate: CandidateReport) -> str:
    if not candidate.tasks:
        return ""
    worse = [task for task in candidate.tasks if is_worse(task) and is_beyond_luck(task)]
    if not worse:
        return f" None of {len(candidate.tasks)} task scores is worse beyond luck."
    worse.sort(key=lambda task: task.recovery if math.isfinite(task.recovery) else -math.inf)
    shown = ", ".join(
        f"{task.task} ({recovery(task, interval=False)}, p = {task.p_value:.2g})"
        for task in worse[:MOST_NAMED]
    )
    more = f", and {len(worse) - MOST_NAMED} that lost less" if len(worse) > MOST_NAMED else ""
    return f" Worse beyond luck on {len(worse)} of {len(candidate.tasks)} task scores: {shown}{more}."
