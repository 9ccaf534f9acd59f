"""`quantkit inspect`: what is in a checkpoint, what can be quantized, and why not the rest."""

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from quantkit.cli.answer import to_stderr
from quantkit.cli.model_options import Revision
from quantkit.errors import QuantkitError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from quantkit.arch import Inspection
    from quantkit.formats.checkpoint import Checkpoint


def inspect(
    source: Annotated[str, typer.Argument(help="A folder, a hub id, a .gguf file, or `demo`.")],
    revision: Revision = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what is in a checkpoint; what can be quantized, and why not the rest."""
    from quantkit.arch import inspect_checkpoint
    from quantkit.formats.checkpoint import open_checkpoint
    from quantkit.formats.source import resolve_source

    checkpoint = open_checkpoint(resolve_source(source, revision=revision, announce=to_stderr))
    inspection = inspect_checkpoint(checkpoint)
    refusal = _runtime_refusal(checkpoint)
    if as_json:
        runtime = {"runs": refusal is None, "why_not": refusal}
        typer.echo(json.dumps({**dataclasses.asdict(inspection), "runtime": runtime}, indent=2))
        return
    from quantkit.cli.output import table_console

    show(inspection, refusal, table_console())


def _runtime_refusal(checkpoint: "Checkpoint") -> str | None:
    """Why quantkit's own runtime does not run this model, or None if it does."""
    from quantkit.runtime.models.families import read_spec

    try:
        read_spec(checkpoint)
    except QuantkitError as error:
        return error.problem
    return None


def show(inspection: "Inspection", runtime_refusal: str | None, console: "Console") -> None:
    """Print the tables."""
    runtime = ("quantkit's runtime", runtime_refusal or "runs it")
    console.print(_table(inspection.path, ("", ""), [*_facts(inspection), runtime]))
    roles = [(c.name, f"{c.tensors:,}", f"{c.values:,}", human_bytes(c.bytes)) for c in inspection.roles]
    console.print(_table("Tensors by role", ("role", "tensors", "values", "size"), roles))
    if inspection.quantized:
        said = f"Nothing can be quantized: this checkpoint is quantized already ({inspection.quantized})."
        console.print(said, markup=False)
        return
    linears = [
        (
            kind.role,
            str(kind.in_features),
            f"{kind.linears:,}",
            f"{kind.parameters:,}",
            _sizes(kind.group_sizes),
        )
        for kind in inspection.quantizable
    ]
    columns = ("linears", "in_features", "number", "parameters", "group sizes")
    console.print(_table("Can be quantized", columns, linears))
    stays = [(count.name, f"{count.tensors:,}", human_bytes(count.bytes)) for count in inspection.stays]
    console.print(_table("Stays as it is", ("why", "tensors", "size"), stays))


def _table(title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> "Table":
    """A table whose first column is text, on the left, and whose others are on the right."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", show_header=any(columns))
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index and any(columns) else "left")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # no markup: names come from files
    return table


def _sizes(group_sizes: tuple[int, ...]) -> str:
    return ", ".join(map(str, group_sizes)) or "none, channel only"


def _facts(inspection: "Inspection") -> list[tuple[str, ...]]:
    dtypes = ", ".join(f"{count.name} ({human_bytes(count.bytes)})" for count in inspection.dtypes)
    vocabulary = "not in config.json" if inspection.vocabulary is None else f"{inspection.vocabulary:,}"
    return [
        ("architecture", f"{inspection.architecture or 'not in config.json'} ({inspection.model_type})"),
        ("parameters", "?" if inspection.parameters is None else f"{inspection.parameters:,}"),
        ("size", f"{human_bytes(inspection.bytes)}, files with weights: {inspection.shards}"),
        ("dtypes", dtypes),
        ("layers", str(inspection.layers)),
        ("vocabulary", vocabulary),
        ("output head", "tied to the embedding" if inspection.tied_head else "of its own"),
        ("chat template", "yes" if inspection.chat_template else "no"),
        ("quantized", inspection.quantized or "no"),
    ]


def human_bytes(count: int) -> str:
    """A size in the largest decimal unit that leaves at least 1."""
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"
