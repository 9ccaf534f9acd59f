"""How figures and names are written on the page."""

import math
from pathlib import Path

from quantkit.evaluation.report import CandidateReport, EvalReport, LinearDamage, TaskComparison

Interval = tuple[float, float]
SIGNIFICANT = 0.05
DASH = "\u2013"  # where there is no figure, and between two


def nats(kl: float) -> str:
    """A KL divergence, three figures of it: 6.78, 0.385, 0.00099, 3.1e-05."""
    if abs(kl) >= 1e-4:
        return f"{kl:.{max(2, 2 - math.floor(math.log10(abs(kl))))}f}"
    return f"{kl:.1e}" if kl else "0"


def nats_range(interval: Interval | None) -> str:
    """ "0.37 to 0.40"; a dash for one window, which has no interval."""
    return DASH if interval is None else f"{nats(interval[0])} to {nats(interval[1])}"


def damage_of(linear: LinearDamage) -> str:
    """In and out of a linear, two figures of each."""
    return f"{linear.kl_in:.2g} · {linear.kl_out:.2g}"


def size(num_bytes: int) -> str:
    """Bytes in MB or GB."""
    return f"{num_bytes / 1e6:.0f} MB" if num_bytes < 1e9 else f"{num_bytes / 1e9:.2f} GB"


def percent(fraction: float) -> str:
    """0.6423 as "64.2 %"."""
    return f"{100 * fraction:.1f} %"


def recovery(task: TaskComparison, *, interval: bool = True) -> str:
    """With its interval; a dash where the original's score has none."""
    if math.isnan(task.recovery):
        return DASH
    ends = task.recovery_ci if interval else None
    return f"{task.recovery:.1f} %" + ("" if ends is None else f" ({ends[0]:.1f}{DASH}{ends[1]:.1f})")


def is_beyond_luck(task: TaskComparison) -> bool:
    """Whether a change, better or worse, is more than luck."""
    return task.p_value is not None and task.p_value < SIGNIFICANT


def is_worse(task: TaskComparison) -> bool:
    """By the scores, which there are even where recovery is not known."""
    loss = task.reference - task.candidate
    return loss > 0 if task.higher_is_better else loss < 0


def short_name(path: str) -> str:
    """The last part of a path, or what was typed if it is none."""
    return Path(path).name or path


def names(report: EvalReport) -> dict[str, str]:
    """What each candidate is called on the page: the short name, or the whole path where two share it."""
    paths = [report.reference.path, *(candidate.path for candidate in report.candidates)]
    short = [short_name(path) for path in paths]
    return {path: name if short.count(name) == 1 else path for path, name in zip(paths, short, strict=True)}


def measured(report: EvalReport) -> list[CandidateReport]:
    """Candidates that have figures."""
    return [candidate for candidate in report.candidates if candidate.damage is not None]
