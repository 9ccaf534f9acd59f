"""What an answer has to look like, checked when made. Free of torch, and of the library that compiles it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantkit.errors import GenerationError

MAX_GRAMMAR_CHARS = 1 << 16
MAX_SCHEMA_DEPTH = 32
WHITESPACE = r"[ \t\n\r]{1,40}"  # an indented line's; without a bound, small models write it until the end

Schema = bool | Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """One of: JSON under a schema, any JSON object, a match of a regular expression, one of some texts, a grammar.

    json: a schema, or its text; what it asks for and cannot be enforced is refused. grammar: in llguidance's dialect of
    Lark. Raises GenerationError for none, for several, and for too much of one.
    """

    json: str | Schema | None = None
    json_object: bool = False
    regex: str | None = None
    choice: tuple[str, ...] = ()
    grammar: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "choice", tuple(self.choice or ()))
        given = (self.json is not None, self.json_object, self.regex is not None, self.choice, self.grammar)
        if sum(map(bool, given)) != 1:
            raise GenerationError(
                "structured_outputs: not exactly one kind of output",
                fix="give one of: json, json_object, regex, choice, grammar",
            )
        num_chars = len(self.regex or self.grammar or "") + sum(map(len, self.choice))
        check_size(num_chars)
        if self.json is not None:
            object.__setattr__(self, "json", schema_text(self.json))


def schema_text(schema: str | Schema) -> str:
    """A JSON schema as ASCII. Raises GenerationError for what is none, or too large or too deep."""
    if isinstance(schema, str):
        check_size(len(schema))
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise GenerationError(f"the JSON schema is no JSON: {error}", fix="give an object") from error
    if not isinstance(schema, bool | Mapping):
        raise GenerationError("a JSON schema is an object, or true", fix='give {"type": "object", …}')
    if is_deeper(schema, MAX_SCHEMA_DEPTH):
        raise GenerationError(
            f"the JSON schema is nested more than {MAX_SCHEMA_DEPTH} deep", fix="move parts to $defs"
        )
    text = json.dumps(schema)
    check_size(len(text))
    return text


def json_rule(schema: str | Schema, *, is_lenient: bool = False) -> str:
    """The part of a grammar that is JSON under a schema. is_lenient: keywords that cannot be enforced are left out."""
    options = {"x-guidance": {"whitespace_pattern": WHITESPACE, "lenient": is_lenient}}
    known = json.loads(schema_text(schema))
    if known is False:
        raise GenerationError("nothing is valid under this JSON schema", fix="give another than false")
    return f"%json {json.dumps({**({} if known is True else known), **options})}"


def check_size(num_chars: int) -> None:
    """Raise GenerationError for more than a grammar may have."""
    if num_chars > MAX_GRAMMAR_CHARS:
        raise GenerationError(
            f"a grammar of {num_chars:,} characters, of at most {MAX_GRAMMAR_CHARS:,}",
            fix="give a smaller one",
        )


def is_deeper(value: object, depth: int) -> bool:
    """Whether lists and objects lie more than so deep in each other."""
    level: list[object] = [value]
    for _ in range(depth):
        level = [inner for each in level for inner in _inside(each)]
        if not level:
            return False
    return bool(level)


def _inside(value: object) -> list[object]:
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return [each for each in inner if isinstance(each, list | Mapping)]
