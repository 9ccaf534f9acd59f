"""Tables of routes as they are on disk, read strictly: a mistake stops the load, with file, place and finding.

    {
      "device": "NVIDIA H100 80GB HBM3", "capability": [9, 0], "multiprocessors": 132,
      "measured": "2026-01-31, torch 2.11.0",
      "families": {"w4a16": {"4096x14336": [[8, "skinny"], [256, "tile"], [null, "wide"]]}}
    }

A shape is N x K of a weight. Its steps: up to 8 rows, up to 256, any number.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit_kernels.family import Family

Shape = tuple[int, int]
Steps = tuple[tuple[int | None, str], ...]
KEYS = {"device": str, "capability": list, "multiprocessors": int, "measured": str, "families": dict}


class TableError(ValueError):
    """A table that says something impossible."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """What was measured on one device. families: of a family's name, of a weight's shape (N, K), the steps."""

    device: str
    capability: tuple[int, int]
    multiprocessors: int
    measured: str
    families: Mapping[str, Mapping[Shape, Steps]]

    def as_json(self) -> str:
        """The file's text: one line for each shape."""
        head = {
            "device": self.device,
            "capability": list(self.capability),
            "multiprocessors": self.multiprocessors,
            "measured": self.measured,
        }
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
        families = ",\n".join(_family_json(name, shapes) for name, shapes in sorted(self.families.items()))
        return "{\n" + "\n".join(lines) + '\n  "families": {\n' + families + "\n  }\n}\n"


def read_table(path: Path, families: Mapping[str, Family]) -> Table:
    """Read a table whose families and routes are among these; raises TableError."""
    try:
        found = json.loads(path.read_text(), object_pairs_hook=_unique_keys)
    except ValueError as error:
        raise TableError(f"{path}: {error}") from error
    _check(type(found) is dict, path, "", f"expected an object, found {_words(found)}")
    for key in found:
        _check(key in KEYS, path, key, f"unknown key; known: {', '.join(KEYS)}")
    for key, kind in KEYS.items():
        _check(key in found, path, key, "missing")
        _check(type(found[key]) is kind, path, key, f"expected {kind.__name__}, found {_words(found[key])}")
    capability = found["capability"]
    is_pair = len(capability) == 2 and all(type(number) is int for number in capability)
    _check(is_pair, path, "capability", f"expected [major, minor], found {_words(capability)}")
    return Table(
        device=found["device"],
        capability=(capability[0], capability[1]),
        multiprocessors=found["multiprocessors"],
        measured=found["measured"],
        families={
            name: _read_family(path, name, shapes, families) for name, shapes in found["families"].items()
        },
    )


def _read_family(path: Path, name: str, shapes: Any, families: Mapping[str, Family]) -> dict[Shape, Steps]:
    place = f"families.{name}"
    _check(name in families, path, place, f"no such family; known: {', '.join(families)}")
    _check(type(shapes) is dict and shapes, path, place, f"expected shapes, found {_words(shapes)}")
    read = {}
    for text, steps in shapes.items():
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
        _check(match is not None, path, f"{place}.{text}", "expected a shape like 4096x14336")
        assert match is not None
        read[int(match[1]), int(match[2])] = _read_steps(path, f"{place}.{text}", steps, families[name])
    return read


def _read_steps(path: Path, place: str, steps: Any, family: Family) -> Steps:
    _check(type(steps) is list and steps, path, place, f"expected steps, found {_words(steps)}")
    routes = {route.name: route for route in family.routes}
    below = 0
    for number, step in enumerate(steps):
        at = f"{place}[{number}]"
        _check(
            type(step) is list and len(step) == 2, path, at, f"expected [rows, route], found {_words(step)}"
        )
        limit, name = step
        is_last = number == len(steps) - 1
        if is_last:
            _check(
                limit is None, path, at, f"the last step takes any number of rows: null, not {_words(limit)}"
            )
        else:
            is_more = type(limit) is int and limit > below
            _check(is_more, path, at, f"expected more than {below} rows, found {_words(limit)}")
            below = limit
        is_route = type(name) is str and name in routes
        _check(is_route, path, at, f"no route {_words(name)}; {family.name} has {', '.join(routes)}")
        most = routes[name].max_rows
        fits = most is None or (limit is not None and limit <= most)
        _check(fits, path, at, f"route {name} takes up to {most} rows")
    return tuple((limit, name) for limit, name in steps)


def _check(is_right: object, path: Path, place: str, finding: str) -> None:
    if not is_right:
        raise TableError(f"{path}: {place}: {finding}" if place else f"{path}: {finding}")


def _words(found: Any) -> str:
    text = json.dumps(found)
    return text if len(text) <= 40 else f"{text[:37]}…"


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"{key} stands there twice")
    return dict(pairs)


def _family_json(name: str, shapes: Mapping[Shape, Steps]) -> str:
    lines = [
        f"      {json.dumps(f'{n}x{k}')}: {json.dumps([list(step) for step in steps])}"
        for (n, k), steps in sorted(shapes.items())
    ]
    return f"    {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n    }"
