"""What the recipe asks for each linear by name: patterns matched, fused linears held together."""

import fnmatch
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from quantkit.arch import LinearInfo, Role
from quantkit.errors import RecipeError
from quantkit.recipe.model import Override, Recipe


class Treatment(NamedTuple):
    """How one linear is treated. recipe: with the keys that hold for it; keep: the reason to stay in 16 bits."""

    recipe: Recipe
    keep: str | None = None


def find_treatments(recipe: Recipe, linears: Sequence[LinearInfo], where: str) -> dict[str, Treatment]:
    """The treatment of every linear by name.

    Raises RecipeError if a pattern matches nothing, or treats linears of one fused group differently.
    """
    treatments = {linear.name: _by_role(recipe, linear.role) for linear in linears}
    for pattern in recipe.ignore:
        for name in _matching(pattern, treatments, f"{where}: ignore"):
            treatments[name] = treatments[name]._replace(keep="listed under ignore")
    for number, override in enumerate(recipe.overrides):
        for name in _matching(override.match, treatments, f"{where}: overrides.{number}"):
            treatments[name] = _overridden(treatments[name], override, recipe)
    _check_fused(linears, treatments, where)
    return treatments


def _by_role(recipe: Recipe, role: Role) -> Treatment:
    if role is not Role.ATTENTION or recipe.attention == "same":
        return Treatment(recipe)
    if recipe.attention == "bf16":
        return Treatment(recipe, keep="an attention projection: this recipe keeps them in 16 bits")
    if recipe.weights in ("int8", "fp8"):
        return Treatment(recipe)  # 8 bits already
    eight = "int8" if recipe.activations == "none" else recipe.activations
    changes = {"weights": eight, "granularity": "channel", "group_size": "auto", "symmetric": True}
    return Treatment(recipe.model_copy(update=changes))


def _overridden(base: Treatment, override: Override, recipe: Recipe) -> Treatment:
    if override.keep:
        return base._replace(keep="kept by an override")
    if base.keep:  # a named linear is quantized even where its role stays; start from the recipe's own keys
        base = _by_role(recipe, Role.MLP)
    given = {key: getattr(override, key) for key in override.model_fields_set - {"match", "keep"}}
    if given.get("granularity", "group") not in ("group", "auto") and "group_size" not in given:
        given["group_size"] = "auto"  # the recipe's belongs to its groups, which this override leaves
    return Treatment(base.recipe.model_copy(update=given))


def _differ(first: Treatment, second: Treatment) -> bool:
    """Whether two linears end up differently; why they stay in 16 bits does not matter."""
    return not (first.keep and second.keep) and first != second


def _matching(pattern: str, names: dict[str, Treatment], where: str) -> list[str]:
    matches = _matcher(pattern, where)
    found = [name for name in names if matches(name)]
    if not found:
        raise RecipeError(
            f"{where}: {pattern!r} matches no linear of this model",
            fix=f"names look like {next(iter(names), 'model.layers.0.mlp.down_proj')}; `quantkit inspect` lists them",
        )
    return found


def _matcher(pattern: str, where: str) -> Callable[[str], object]:
    if not pattern.startswith("re:"):
        return lambda name: fnmatch.fnmatchcase(name, pattern)
    try:
        return re.compile(pattern[3:]).match
    except re.error as error:
        raise RecipeError(
            f"{where}: {pattern!r} is not a regular expression ({error})", fix="correct it"
        ) from None


def _check_fused(linears: Sequence[LinearInfo], treatments: dict[str, Treatment], where: str) -> None:
    groups: dict[str, list[str]] = defaultdict(list)
    for linear in linears:
        groups[linear.group].append(linear.name)
    for group, names in groups.items():
        different = next((name for name in names if _differ(treatments[name], treatments[names[0]])), None)
        if different:
            raise RecipeError(
                f"{where}: {names[0]} and {different} are treated differently, but serving engines run {group} "
                f"as one matmul of {len(names)} fused linears",
                fix="match all of them with one pattern, or none",
            )
