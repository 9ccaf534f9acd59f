"""What `quantkit eval` shows: how far it is, on stderr, and the table at the end."""

import math
import time
from typing import Self

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from quantkit.cli.output import table_console
from quantkit.evaluation import CandidateReport, EvalReport
from quantkit.evaluation.page.figures import size
from quantkit.evaluation.report import DamageMap
from quantkit.evaluation.tasks.statistics import MCNEMAR

LINE_SECONDS = 30.0
WORST_LINEARS = 8


class Display:
    """Progress and remarks: a bar on a terminal; elsewhere a line per model and every half minute."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}, left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
            speed_estimate_period=120,
        )
        self._task: TaskID | None = None
        self._label = self._unit = ""
        self._first = (0.0, 0)
        self._last_line = 0.0

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def say(self, line: str, /) -> None:
        """Print a remark."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def step(self, label: str, done: int, total: int, unit: str = "windows", /) -> None:
        """Move the bar, or print a line if one is due."""
        now = time.monotonic()
        if self._task is None or unit != self._unit or (unit != "windows" and label != self._label):
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(label, total=total, unit=unit)
            self._first, self._unit = (now, done), unit
        self._bar.update(self._task, description=label, completed=done, total=total)
        is_due = label != self._label or now - self._last_line > LINE_SECONDS
        if is_due and not self._console.is_terminal:
            self._last_line = now
            self.say(f"{label}: {done} of {total} {unit}{self._time_left(now, done, total)}")
        self._label = label

    def _time_left(self, now: float, done: int, total: int) -> str:
        start, done_then = self._first
        if done <= done_then or done == total:
            return ""
        return f", about {(now - start) / (done - done_then) * (total - done):.0f} s left"


def show(report: EvalReport, console: Console | None = None) -> None:
    """Print the table, and how it was measured, on stdout."""
    console = console or table_console()
    console.print(_table(report))
    for candidate in report.candidates:
        if candidate.failure is not None:
            console.print(f"{candidate.path} {candidate.failure}.", markup=False, highlight=False)
    asked = [candidate for candidate in report.candidates if candidate.tasks]
    for candidate in asked:
        console.print(_tasks_table(candidate))
    if asked:
        console.print(
            "recovery: percent of the original's score, with its 95 % interval over items; p: of no difference; flips: "
            "items that became right, and wrong.",
            markup=False,
            highlight=False,
        )
    for candidate in report.candidates:
        if candidate.where is not None:
            console.print(_worst_linears(candidate, candidate.where))
    data = report.data
    console.print(
        f"{data.windows} windows of {data.length} tokens, from {data.spec} ({data.tokens:,} tokens). KL in nats "
        "against the original in float32, ± half of the 95 % interval of the mean (bootstrap over whole windows); "
        f"noise: what computing the original in {report.reference.dtype} costs by itself. bpw: bits per weight of "
        f"the decoder layers' linears, scales included. {_how(report)}",
        markup=False,
        highlight=False,
    )


def _how(report: EvalReport) -> str:
    """How the candidates were run."""
    ran = [candidate for candidate in report.candidates if candidate.kernels]
    ways = sorted({f"{candidate.dtype} ({candidate.kernels})" for candidate in ran})
    cache = "" if report.kv_cache_dtype == "auto" else f", KV cache in {report.kv_cache_dtype}"
    return f"Candidates in {', '.join(ways)} on {report.device}{cache}."


def _table(report: EvalReport) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("", overflow="fold", min_width=10)
    for column in ("ppl", "Δppl", "KL mean", "median", "p99", "top-1", "bpw", "size"):
        table.add_column(column, justify="right", no_wrap=True)
    original = report.reference
    noise = f"noise {original.kl_noise_floor:.4f}"
    sizes = (f"{original.bits_per_weight:.2f}", size(original.bytes))
    table.add_row(Text(original.path), f"{original.ppl:.2f}", "", noise, "", "", "", *sizes)
    for candidate in report.candidates:
        table.add_row(Text(candidate.path), *_figures(candidate))
    return table


def _figures(candidate: CandidateReport) -> tuple[str, ...]:
    sizes = (f"{candidate.bits_per_weight:.2f}", size(candidate.bytes)) if candidate.bytes else ("", "")
    damage = candidate.damage
    if damage is None:
        return ("broken", *[""] * 5, *sizes)
    interval = "" if damage.kl_ci is None else f" ±{(damage.kl_ci[1] - damage.kl_ci[0]) / 2:.4f}"
    return (
        f"{damage.ppl:.2f}",
        f"{damage.ppl_increase:+.1f}%",
        f"{damage.kl_mean:.4f}{interval}",
        f"{damage.kl_median:.4f}",
        f"{damage.kl_p99:.2f}",
        f"{damage.top1:.3f}",
        *sizes,
    )


def _worst_linears(candidate: CandidateReport, damage_map: DamageMap) -> Table | Text:
    """Those that cost most by themselves; all of them are in the page and the JSON."""
    linears = [one for one in damage_map.linears if one.kind != "layer"]
    if not linears:
        return Text(f"{candidate.path}: its linears are the original's, so there is nothing to swap")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column(Text(f"worst linears of {candidate.path}"), overflow="fold", min_width=10)
    for column in ("KL in", "KL out"):
        table.add_column(column, justify="right", no_wrap=True)
    for one in sorted(linears, key=lambda one: -one.kl_in)[:WORST_LINEARS]:
        table.add_row(Text(one.linear), f"{one.kl_in:.3g}", f"{one.kl_out:.3g}")
    return table


def _tasks_table(candidate: CandidateReport) -> Table:
    """Scores beside the original's; flips: from wrong to right, and from right to wrong."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column(Text(f"tasks of {candidate.path}"), overflow="fold", min_width=10)
    for column in ("items", "original", "candidate", "recovery", "p", "flips"):
        table.add_column(column, justify="right", no_wrap=True)
    for found in candidate.tasks:
        interval = "" if found.recovery_ci is None else " ({:.1f} to {:.1f})".format(*found.recovery_ci)
        recovery = "" if math.isnan(found.recovery) else f"{found.recovery:.1f}%{interval}"
        lost = sum(flip.was_right for flip in found.flips)
        table.add_row(
            Text(f"{found.task}, {found.metric}"),
            str(found.num_items),
            f"{found.reference:.4g}",
            f"{found.candidate:.4g}",
            recovery,
            "" if found.p_value is None else f"{found.p_value:.3f}",
            f"+{len(found.flips) - lost} -{lost}" if found.test == MCNEMAR else "",
        )
    return table
