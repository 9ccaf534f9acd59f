"""`quantkit recipes`: list the shipped recipes, print one, or print the schema."""

import json
from typing import Annotated

import typer


def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe.")] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema: every key explained.")
    ] = False,
) -> None:
    """List the recipes, print one, or explain the keys."""
    from quantkit.recipe import load_recipe, shipped_recipes
    from quantkit.recipe.load import find_recipe
    from quantkit.recipe.model import Recipe

    if schema:
        typer.echo(json.dumps(Recipe.model_json_schema(), indent=2, ensure_ascii=False))
    elif name is not None:
        typer.echo(find_recipe(name).read_text(encoding="utf-8"), nl=False)
    else:
        for shipped in shipped_recipes():
            typer.echo(f"{shipped:12} {load_recipe(shipped).description}")
