"""`quantkit eval`: what candidates lost against their original."""

import json
import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID
    from rich.table import Table

    from quantkit.evaluation import CandidateReport, EvalReport


def eval_models(
    reference: Annotated[
        str, typer.Argument(help="The original: a folder, a hub id, a .gguf file, or `demo`.")
    ],
    candidates: Annotated[list[str], typer.Argument(help="Checkpoints made from it.")],
    data: Annotated[
        str, typer.Option(help="Text: a file or folder (txt, jsonl, parquet), hf:dataset, or `docs`.")
    ] = "docs",
    windows: Annotated[int, typer.Option(help="Windows of text, spread evenly over it.")] = 24,
    length: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    max_kl: Annotated[float | None, typer.Option(help="Gate: mean KL divergence, in nats.")] = None,
    max_ppl_increase: Annotated[
        str | None, typer.Option(help="Gate: perplexity over the original's, in percent.", metavar="P%")
    ] = None,
    min_top1: Annotated[
        float | None, typer.Option(help="Gate: how often both find the same token likeliest (0 to 1).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Measure what candidates lost against their original; exit code 1 if a gate fails."""
    from rich.console import Console

    from quantkit.evaluation import Gates, describe_failure, evaluate, parse_percent

    gates = Gates(
        max_kl=max_kl,
        max_ppl_increase=None if max_ppl_increase is None else parse_percent(max_ppl_increase),
        min_top1=min_top1,
    )
    errors = Console(stderr=True)
    with _progress(errors) as progress:
        report = evaluate(
            reference,
            candidates,
            data=data,
            windows=windows,
            length=length,
            gates=gates,
            listener=_Display(errors, progress),
        )
    _fill_cards(report)
    if as_json:
        typer.echo(json.dumps(_finite(report.to_json()), indent=2, allow_nan=False))
    else:
        show(report, _stdout())
    for result in report.gates:
        if not result.passed:
            typer.echo(describe_failure(result), err=True)
    return 0 if report.passed else 1


class _Display:
    """Progress and remarks on stderr: a bar on a terminal, else a line per model."""

    def __init__(self, console: "Console", progress: "Progress") -> None:
        self.console = console
        self.progress = progress
        self.task: TaskID | None = None
        self.label = ""

    def say(self, line: str, /) -> None:
        """Print a remark."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def step(self, label: str, done: int, total: int, /) -> None:
        """Move the bar."""
        if label != self.label and not self.console.is_terminal:
            self.say(f"{label} ({done} of {total} windows)")
        self.label = label
        if self.task is None:
            self.task = self.progress.add_task(label, total=total)
        self.progress.update(self.task, description=label, completed=done, total=total)


def _stdout() -> "Console":
    """The terminal, or a file or pipe with room for long names."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, 120))


def _progress(console: "Console") -> "Progress":
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("windows, left:"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
        speed_estimate_period=120,
    )


def _fill_cards(report: "EvalReport") -> None:
    from quantkit.evaluation import fill_card

    for candidate in report.candidates:
        try:
            fill_card(report, candidate)
        except OSError as error:
            line = f"{candidate.path}: the figures are not in its README.md, which cannot be written"
            typer.echo(f"{line} ({error.strerror})", err=True)


def show(report: "EvalReport", console: "Console") -> None:
    """Print the table, and how it was measured."""
    console.print(_table(report))
    data = report.data
    console.print(
        f"{data.windows} windows of {data.length} tokens, from {data.spec} ({data.tokens:,} tokens). KL in nats "
        "against the original in float32, ± half of the 95 % interval of the mean (bootstrap over whole windows); "
        f"noise: what computing the original in {report.reference.dtype} costs by itself. bpw: bits per weight of "
        "the decoder layers' linears, scales included.",
        markup=False,
        highlight=False,
    )


def _table(report: "EvalReport") -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("", overflow="fold", min_width=10)
    for column in ("ppl", "Δppl", "KL mean", "median", "p99", "top-1", "bpw", "size"):
        table.add_column(column, justify="right", no_wrap=True)
    original = report.reference
    noise = f"noise {original.kl_noise_floor:.4f}"
    size = (f"{original.bits_per_weight:.2f}", _size(original.bytes))
    table.add_row(Text(original.path), f"{original.ppl:.2f}", "", noise, "", "", "", *size)
    for candidate in report.candidates:
        table.add_row(Text(candidate.path), *_figures(candidate))
    return table


def _figures(candidate: "CandidateReport") -> tuple[str, ...]:
    size = (f"{candidate.bits_per_weight:.2f}", _size(candidate.bytes))
    damage = candidate.damage
    if damage is None:
        return ("broken", *[""] * 5, *size)
    interval = "" if damage.kl_ci is None else f" ±{(damage.kl_ci[1] - damage.kl_ci[0]) / 2:.4f}"
    return (
        f"{damage.ppl:.2f}",
        f"{damage.ppl_increase:+.1f}%",
        f"{damage.kl_mean:.4f}{interval}",
        f"{damage.kl_median:.4f}",
        f"{damage.kl_p99:.2f}",
        f"{damage.top1:.3f}",
        *size,
    )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.0f} MB" if num_bytes < 1e9 else f"{num_bytes / 1e9:.2f} GB"


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
