"""The report as GitHub-flavoured Markdown, for the summary of a CI job or a comment: verdict, table, what failed."""

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from quantkit.evaluation.gates import describe_failure
from quantkit.evaluation.report import CandidateReport, EvalReport, Flip, TaskComparison
from quantkit.formats.durable import write_atomically

MAX_FLIPS = 5  # shown, of a candidate
MAX_CHARS = 160  # of a prompt's end or an answer

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~$@&])")


def write_markdown(report: EvalReport, path: str | Path) -> None:
    """Write the file, whole or not at all. Raises OSError."""
    write_atomically(
        Path(path), markdown(report).encode("utf-8", "replace")
    )  # names of files may be no UTF-8


def markdown(report: EvalReport) -> str:
    """Verdict first, then figures of all candidates, gates that are not met, tasks, and items that changed."""
    blocks = [_verdict(report), _figures(report), *_failures(report), *_tasks(report), *_flips(report)]
    data = report.data
    how = f"{data.windows} windows of {data.length} tokens of {_cell(data.spec)}, on {_cell(report.device)}"
    return "\n\n".join([*blocks, f"<sub>{how}. KL in nats against the original in float32.</sub>"]) + "\n"


def _verdict(report: EvalReport) -> str:
    failed = sum(not gate.passed for gate in report.gates)
    broken = sum(candidate.failure is not None for candidate in report.candidates)
    found = [f"{failed} of {_count(len(report.gates), 'gate')} not met"] if failed else []
    found += [f"{_count(broken, 'candidate')} broken"] if broken else []
    if found:
        return f"## ❌ {' and '.join(found)}"
    is_one = len(report.candidates) == 1
    if report.gates:
        result = f"{'meets' if is_one else 'meet'} {_count(len(report.gates), 'gate')}"
    else:
        result = f"{'was' if is_one else 'were'} measured, without a gate"
    return f"## ✅ {_count(len(report.candidates), 'candidate')} of {_cell(report.reference.path)} {result}"


def _figures(report: EvalReport) -> str:
    original = report.reference
    rows = [("", "perplexity", "KL", "95 %", "top-1", "bits per weight", "MB")]
    size = (f"{original.bits_per_weight:.2f}", f"{original.bytes / 1e6:.0f}")
    noise = f"{original.kl_noise_floor:.4f} (noise)"
    rows += [(_cell(original.path), f"{original.ppl:.3f}", noise, "", "", *size)]
    return _table([*rows, *(_candidate_row(candidate) for candidate in report.candidates)])


def _candidate_row(candidate: CandidateReport) -> tuple[str, ...]:
    size = (
        _number(candidate.bits_per_weight, ".2f"),
        f"{candidate.bytes / 1e6:.0f}" if candidate.bytes else "",
    )
    damage = candidate.damage
    if damage is None:
        return (_cell(candidate.path), "broken", "", "", "", *size)
    interval = "" if damage.kl_ci is None else f"{damage.kl_ci[0]:.4f} … {damage.kl_ci[1]:.4f}"
    ppl = f"{damage.ppl:.3f} ({damage.ppl_increase:+.2f} %)"
    return (_cell(candidate.path), ppl, f"{damage.kl_mean:.4f}", interval, f"{damage.top1:.3f}", *size)


def _failures(report: EvalReport) -> Iterator[str]:
    lines = [f"{candidate.path} {candidate.failure}" for candidate in report.candidates if candidate.failure]
    lines += [describe_failure(gate) for gate in report.gates if not gate.passed]
    if lines:
        yield "### Not met\n\n" + "\n".join(f"- {_cell(line)}" for line in lines)


def _tasks(report: EvalReport) -> Iterator[str]:
    for candidate in report.candidates:
        if candidate.tasks:
            rows = [
                ("task", "items", "original", "candidate", "recovery", "95 %", "p"),
                *map(_task_row, candidate.tasks),
            ]
            yield f"### Tasks: {_cell(candidate.path)}\n\n{_table(rows)}"


def _task_row(found: TaskComparison) -> tuple[str, ...]:
    low_high = found.recovery_ci
    return (
        f"{_cell(found.task)} ({_cell(found.metric)})",
        str(found.num_items),
        f"{found.reference:.3f}",
        f"{found.candidate:.3f}",
        _number(found.recovery, ".1f", " %"),
        "" if low_high is None else f"{low_high[0]:.1f} … {low_high[1]:.1f}",
        "" if found.p_value is None else f"{found.p_value:.3g}",
    )


def _flips(report: EvalReport) -> Iterator[str]:
    """Items that the original got right and the candidate does not; those of the tasks that lost most come first."""
    for candidate in report.candidates:
        tasks = sorted(candidate.tasks, key=lambda found: found.recovery)
        lost = [(found.task, flip) for found in tasks for flip in found.flips if flip.was_right]
        if lost:
            head = ("task", "prompt ends with", "right", "original", "candidate")
            rows = [head, *(_flip_row(task, flip) for task, flip in lost[:MAX_FLIPS])]
            title = f"{_count(len(lost), 'answer')} of {_cell(candidate.path)} went from right to wrong"
            yield f"<details><summary>{title}</summary>\n\n{_table(rows)}\n\n</details>"


def _flip_row(task: str, flip: Flip) -> tuple[str, ...]:
    answers = (flip.target, flip.reference, flip.candidate)
    return (_cell(task), _cell(flip.prompt[-MAX_CHARS:]), *(_cell(answer[:MAX_CHARS]) for answer in answers))


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    """The first row is the head."""
    head, *body = rows
    lines = [head, ("---",) * len(head), *body]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def _number(value: float, form: str, unit: str = "") -> str:
    """Nothing for a figure that is not known."""
    return "" if math.isnan(value) else f"{value:{form}}{unit}"


def _cell(text: str) -> str:
    """Any text on one line, as text and not as Markdown or HTML."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
