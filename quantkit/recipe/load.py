"""Recipes from YAML: shipped ones by name, others by path, changed by `--set`; errors name file and line."""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from quantkit.errors import RecipeError
from quantkit.recipe.model import SECTIONS, Override, Recipe
from quantkit.resources import data_dir

_UNKNOWN_KEY = ("extra_forbidden", "invalid_key")
_VALUE_FIX = "correct it; `quantkit recipes --schema` explains every key"


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with quantkit, by name."""
    files = data_dir("recipes").glob("*.yaml")
    return {file.stem: file for file in sorted(files, key=lambda file: file.stem)}


def load_recipe(name_or_path: str, settings: tuple[str, ...] = ()) -> Recipe:
    """A shipped recipe by name or a YAML file, with `KEY=VALUE` settings applied (KEY dotted, VALUE YAML).

    Raises RecipeError naming file and line, or the setting, for anything that is not a valid recipe.
    """
    file = find_recipe(name_or_path)
    content, lines = parse_yaml(file)
    for setting in settings:
        _apply(content, setting)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise _invalid(error, file, lines, settings) from None


def find_recipe(name_or_path: str) -> Path:
    """The file of a recipe. Raises RecipeError with the nearest names if there is none."""
    shipped = shipped_recipes()
    if name_or_path in shipped:
        return shipped[name_or_path]
    path = Path(name_or_path)
    if path.is_file():
        return path
    near = difflib.get_close_matches(name_or_path, shipped, n=1)
    hint = f"did you mean `{near[0]}`? " if near else ""
    raise RecipeError(
        f"{name_or_path}: neither a shipped recipe nor a file",
        fix=f"{hint}`quantkit recipes` lists them: {', '.join(shipped)}",
    )


def parse_yaml(file: Path, example: str = "`quantkit recipes int4`") -> tuple[dict[str, Any], dict[str, int]]:
    """A mapping in YAML as plain data, and the line of every dotted path in it. example: of such a file.

    Raises RecipeError.
    """
    try:
        text = file.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
        place = f"{file}:{mark.line + 1}" if mark else str(file)
        raise RecipeError(f"{place}: not valid YAML ({_first_line(error)})", fix="correct the file") from None
    if not isinstance(content, dict):
        raise RecipeError(
            f"{file}: not a list of `key: value` lines",
            fix=f"see {example}",
        )
    if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
        raise RecipeError(f"{file}: uses a YAML alias (*name)", fix="write the value out")
    lines: dict[str, int] = {}
    _collect_lines(root, "", lines, file)
    return content, lines


def _collect_lines(node: yaml.Node | None, path: str, lines: dict[str, int], file: Path) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = f"{path}.{key.value}" if path else str(key.value)
            if inner in lines:
                raise RecipeError(
                    f"{file}:{key.start_mark.line + 1}: {inner} is given twice",
                    fix="remove one of the two lines",
                )
            lines[inner] = key.start_mark.line + 1
            _collect_lines(value, inner, lines, file)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            lines[f"{path}.{number}"] = value.start_mark.line + 1
            _collect_lines(value, f"{path}.{number}", lines, file)


def _apply(content: dict[str, Any], setting: str) -> None:
    key, equals, raw = setting.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"--set {setting}: not KEY=VALUE", fix="for example --set group_size=64")
    try:
        value = yaml.safe_load(raw)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that there is not
        raise RecipeError(
            f"--set {setting}: the value is not valid YAML ({_first_line(error)})", fix="quote it"
        ) from None
    *parents, last = key.strip().split(".")
    place: Any = content
    for part in parents:
        if place is content and part in SECTIONS:
            place.setdefault(part, {})
        place = _descend(place, part, setting)
    if isinstance(place, list):
        place[_position(place, last, setting)] = value
    elif isinstance(place, dict):
        place[last] = value
    else:
        raise RecipeError(f"--set {setting}: {key} is inside a plain value", fix=_keys_hint())


def _descend(place: Any, part: str, setting: str) -> Any:
    if isinstance(place, list):
        return place[_position(place, part, setting)]
    if isinstance(place, dict) and part in place:
        return place[part]
    raise RecipeError(f"--set {setting}: the recipe has no {part}", fix=_keys_hint())


def _position(place: list[Any], part: str, setting: str) -> int:
    if part.isdecimal() and int(part) < len(place):
        return int(part)
    raise RecipeError(f"--set {setting}: {part} is not a place in a list of {len(place)}", fix="count from 0")


def _invalid(
    error: ValidationError, file: Path, lines: dict[str, int], settings: tuple[str, ...]
) -> RecipeError:
    first = error.errors()[0]
    if not first["loc"]:  # keys that do not go together
        return RecipeError(f"{file}: {first['msg'].removeprefix('Value error, ')}", fix=_VALUE_FIX)
    path = _dotted(first)
    place = _place(path, file, lines, settings)
    if first["type"] in _UNKNOWN_KEY:
        unknown = str(first["loc"][-1])
        section = SECTIONS.get(path.partition(".")[0], Override)
        fields = section.model_fields if "." in path else Recipe.model_fields
        near = difflib.get_close_matches(unknown, fields, n=1)
        return RecipeError(
            f"{place}: unknown key {unknown}",
            fix=f"did you mean `{near[0]}`?" if near else _keys_hint(fields),
        )
    if first["type"] == "missing":
        return RecipeError(f"{place}: `{path}` is missing", fix=_keys_hint())
    if first["type"] == "value_error":
        return RecipeError(f"{place}: {path}: {first['msg'].removeprefix('Value error, ')}", fix=_VALUE_FIX)
    # a value that may be of several kinds fails once for each
    wanted = [
        other["msg"].removeprefix("Input should be ") for other in error.errors() if _dotted(other) == path
    ]
    return RecipeError(
        f"{place}: {path} is {first['input']!r}, but should be {' or '.join(wanted)}", fix=_VALUE_FIX
    )


def _dotted(detail: ErrorDetails) -> str:
    """The path of what is wrong as `lines` has it, without the names that pydantic gives the parts of a union."""
    head, *rest = map(str, detail["loc"])
    known = {*Recipe.model_fields, *Override.model_fields}
    known |= {name for section in SECTIONS.values() for name in section.model_fields}
    if detail["type"] in _UNKNOWN_KEY:
        known |= {str(detail["loc"][-1])}
    return ".".join([head, *(name for name in rest if name in known or name.isdecimal())])


def _place(path: str, file: Path, lines: dict[str, int], settings: tuple[str, ...]) -> str:
    """The setting that the value at this path came from, else file and line."""
    for setting in reversed(settings):
        key = setting.partition("=")[0].strip()
        if path == key or path.startswith(f"{key}."):
            return f"--set {setting}"
    parts = path.split(".")
    known = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    line = next((lines[name] for name in known if name in lines), None)
    return str(file) if line is None else f"{file}:{line}"


def _keys_hint(fields: Iterable[str] = Recipe.model_fields) -> str:
    return f"keys are {', '.join(fields)}; `quantkit recipes --schema` explains them"


def _first_line(error: Exception) -> str:
    problem = error.problem if isinstance(error, yaml.MarkedYAMLError) else None
    return (problem or str(error)).splitlines()[0]
