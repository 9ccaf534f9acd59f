"""`quantkit quantize`: parse, run with a progress bar, print what was done."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantkit.errors import RecipeError

if TYPE_CHECKING:
    from rich.console import Console

    from quantkit.quantize import QuantReport, Step


def quantize(
    source: Annotated[str, typer.Argument(help="A checkpoint folder, a hub id, a .gguf file, or `demo`.")],
    recipe: Annotated[str, typer.Option("-r", "--recipe", help="A shipped recipe by name, or a YAML file.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and its costs; write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Remove an earlier run in the folder.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Quantize a checkpoint into a folder that transformers, vLLM and quantkit load.

    Killed or interrupted, the same command continues where it stopped.
    """
    from rich.console import Console

    from quantkit.formats.source import resolve_source
    from quantkit.quantize import quantize_checkpoint
    from quantkit.recipe import load_recipe

    chosen = load_recipe(recipe, tuple(settings or ()))
    path = resolve_source(source, revision=revision)
    if dry_run:
        _print_dry_run(path, chosen, recipe, as_json)
        return
    console = Console(stderr=True)
    with _Progress(console) as progress:
        report = quantize_checkpoint(
            path,
            chosen,
            output,
            base=_base_name(source),
            where=recipe,
            overwrite=overwrite,
            on_step=progress.show,
        )
    _print_report(report, as_json)
