"""`quantkit quantize`: parse, run with a progress bar, print what was done."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from quantkit.cli.answer import to_stderr
from quantkit.cli.model_options import Revision

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID
    from rich.table import Table

    from quantkit.quantization import DryRun, QuantReport, Step
    from quantkit.quantization.calibration_cost import CalibrationCost


def quantize(
    source: Annotated[str, typer.Argument(help="A checkpoint folder, a hub id, a .gguf file, or `demo`.")],
    recipe: Annotated[str, typer.Option("-r", "--recipe", help="A shipped recipe by name, or a YAML file.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe.")
    ] = None,
    revision: Revision = None,
    calib: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC", help="Calibration text: a file or folder, `hf:DATASET`, `docs` or `self`."
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="Where calibration computes: cpu or cuda; default: a GPU if there is one."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and its costs; write nothing.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Remove an earlier run in the folder.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Quantize a checkpoint into a folder that transformers, vLLM and quantkit load.

    Killed or interrupted, the same command continues where it stopped.
    """
    if dry_run:
        _print_dry_run(source, recipe, output, settings or [], revision, calib, device, as_json)
        return
    from rich.console import Console

    from quantkit.api import quantize as run

    with _Progress(Console(stderr=True)) as progress:
        report = run(
            source,
            recipe,
            output,
            settings=settings or (),
            revision=revision,
            calib=calib,
            device=device,
            overwrite=overwrite,
            on_step=progress.show,
            announce=progress.say,
        )
    _print_report(report, as_json)


def _print_dry_run(
    source: str,
    recipe: str,
    output: Path,
    settings: Sequence[str],
    revision: str | None,
    calib: str | None,
    device: str | None,
    as_json: bool,
) -> None:
    from quantkit.cli.output import table_console
    from quantkit.formats.source import resolve_source
    from quantkit.quantization import dry_run
    from quantkit.recipe import load_recipe

    chosen = load_recipe(recipe, tuple(settings))
    path = resolve_source(source, revision=revision, announce=to_stderr)
    plan = dry_run(path, chosen, folder=output, where=recipe, calib=calib, device=device, announce=to_stderr)
    if as_json:
        typer.echo(json.dumps(plan.as_dict(), indent=2))
        return
    console = table_console()
    console.print(_plan_table(plan), highlight=False)
    before, after = plan.before_bytes / 1e9, plan.after_bytes / 1e9
    console.print(f"size    {before:.3f} GB -> {after:.3f} GB ({after / before:.0%})")
    console.print(f"memory  {plan.peak_bytes / 1e9:.2f} GB at the peak (estimated)")
    console.print(f"time    {plan.seconds:.0f} s (estimated from a sample on this machine)")
    if plan.calibration is not None:
        console.print(_calibration_lines(plan.calibration), markup=False, highlight=False, soft_wrap=True)
    for verdict in plan.loaders:
        why = "; ".join(reason.text for reason in verdict.reasons)
        line = f"{verdict.loader:13} {verdict.loads}: {why}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _calibration_lines(cost: "CalibrationCost") -> str:
    text = f"text    {cost.samples} x {cost.length} tokens of {cost.text}, "
    text += f"{cost.passes} x through each layer on {cost.device}"
    if cost.device_peak_bytes is not None:
        text += f"\nGPU     {cost.device_peak_bytes / 1e9:.2f} GB at the peak (estimated)"
    return text + "".join(f"\nmodel   {name} holds the whole model in memory" for name in cost.holds_model)


def _plan_table(plan: "DryRun") -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Nothing is written: this is the plan", title_justify="left")
    for column in ("tensor", "scheme, or why it stays", "before", "after"):
        table.add_column(
            column, justify="right" if column in ("before", "after") else "left", overflow="fold"
        )
    for row in plan.rows:
        cells = (row.name, row.treatment, f"{row.before_bytes:,}", f"{row.after_bytes:,}")
        table.add_row(*map(Text, cells))  # no markup: names come from files
    return table


class _Progress:
    """A bar with an estimate of the time left, and a line for each linear above it, on stderr."""

    def __init__(self, console: "Console") -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f}%"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def show(self, step: "Step") -> None:
        """Take one finished tensor into account."""
        from quantkit.schemes.labels import scheme_label

        if step.phase not in self._tasks:
            self._tasks[step.phase] = self._bar.add_task(step.phase, total=None)
        self._bar.update(self._tasks[step.phase], completed=step.done_bytes, total=step.total_bytes)
        if step.linear is not None and step.linear.scheme is not None:
            label = scheme_label(step.linear.scheme)
            self.say(f"{step.linear.name}  {label}  {_describe(step.note)}  {step.seconds:.2f} s")


def _describe(note: Mapping[str, Any]) -> str:
    """What came of a linear: algorithm, signal to noise, and its output's error beside that of the nearest codes."""
    parts = [
        note.get("algorithm", "rtn"),
        "exact" if note["sqnr_db"] is None else f"{note['sqnr_db']:.1f} dB",
    ]
    if note.get("loss_rtn"):
        parts.append(f"loss {note['loss']:.3g} ({note['loss'] / note['loss_rtn']:.0%} of rtn)")
    return "  ".join(parts + ([f"fallback: {note['fallback']}"] if "fallback" in note else []))


def _print_report(report: "QuantReport", as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(report._asdict() | {"folder": str(report.folder)}, indent=2))
        return
    if report.was_finished:
        typer.echo(f"{report.folder} is finished already, with the same recipe and source; nothing to do")
        return
    ratio = report.after_bytes / report.before_bytes
    typer.echo(
        f"{report.folder}: {report.before_bytes / 1e9:.3f} GB -> {report.after_bytes / 1e9:.3f} GB ({ratio:.0%}) "
        f"in {report.seconds:.1f} s, peak memory {report.peak_rss_bytes / 1e9:.2f} GB"
    )
