"""`quantkit verify`: is a checkpoint folder complete and correct to the bit, and who can load it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantkit.cli.inspect import human_bytes

if TYPE_CHECKING:
    from rich.console import Console

    from quantkit.verify import VerifyReport


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint folder, quantized or not.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Re-open a folder, check completeness and byte-exactness, say who can load it (exit 1: findings)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    from quantkit.cli.output import table_console
    from quantkit.verify import verify_checkpoint

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    terminal = Console(stderr=True)
    bar = Progress("linears", *columns, console=terminal, transient=True, disable=not terminal.is_terminal)
    with bar as progress:
        task = progress.add_task("", total=None)
        report = verify_checkpoint(
            folder, on_linear=lambda done, total: progress.update(task, completed=done, total=total)
        )
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=2))
    else:
        show(report, table_console())
    return 0 if report.is_ok else 1


def show(report: "VerifyReport", console: "Console") -> None:
    """Print what is in the folder, what is wrong with it, and who can load it."""
    from rich.markup import escape
    from rich.table import Table

    console.print(f"{escape(report.path)}: {report.num_tensors:,} tensors, {human_bytes(report.num_bytes)}")
    for scheme, count in sorted(report.schemes.items()):
        console.print(f"  {count:,} linears {scheme}")
    console.print(f"  KV cache {report.kv_cache or '16 bits'}")
    if report.num_quantized:
        console.print(
            f"  {report.num_compared:,} of {report.num_quantized:,} quantized linears give the same weights, "
            "bit for bit, in compressed_tensors"
        )
    if report.findings:
        count = len(report.findings)
        wrong = Table(title="1 finding" if count == 1 else f"{count} findings", title_justify="left")
        for column in ("where", "found", "expected"):
            wrong.add_column(column, overflow="fold")  # a long name is broken, not cut
        for finding in report.findings:
            wrong.add_row(*map(escape, finding))
        console.print(wrong)
    else:
        console.print("nothing is wrong with it")
    loaders = Table("loader", "loads", title="Who can load it", title_justify="left")
    for column in ("why", "evidence"):
        loaders.add_column(column, overflow="fold")
    for verdict in report.loaders:
        for row, reason in enumerate(verdict.reasons):
            first = (verdict.loader, verdict.loads) if row == 0 else ("", "")
            loaders.add_row(*first, escape(reason.text), escape(reason.evidence))
        loaders.add_section()
    console.print(loaders)
