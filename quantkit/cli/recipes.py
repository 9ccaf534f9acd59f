"""`quantkit recipes`: list the shipped recipes, print one, or print the schema."""

import json
from typing import Annotated

import typer

from quantkit.errors import RecipeError


def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe.")] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema: every key explained.")
    ] = False,
) -> None:
    """List the recipes, print one, or explain the keys."""
    if schema and name is not None:
        raise RecipeError(
            f"--schema with {name}: the schema is that of all recipes",
            fix=f"quantkit recipes --schema, or quantkit recipes {name}",
        )
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
