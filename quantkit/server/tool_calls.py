"""Calls of tools in the text of an answer: found while it comes, in pieces of any size, with the same result for all.

    text ─ an opening, or where a text may begin with one ─► call ─ a JSON object that is one ─► closing ─► gap ─► text
                                                                 └─ that is none: it is content ──────────────────► text

What might be a call is held back until it is certain. A call is given as a whole, since one that turns out to be
malformed is content; nothing but white space after calls is lost.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from quantkit.errors import ServerError

MAX_DEPTH = 64  # of a call's JSON
SPACE = " \t\n\r"
JSON_CHARACTERS = frozenset(f'{SPACE}{{}}[]:,"0123456789+-.eEtrufalsn')  # outside of strings


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolStyle:
    """How a model writes a call: opening, {"name": …, key: {…}}, closing. keys: of the arguments, its own first.

    is_bare: a text may begin with the object alone, and more may follow it after semicolons.
    """

    name: str
    opening: str
    closing: str
    keys: tuple[str, ...]
    is_bare: bool

    def written(self, name: str, arguments: str) -> str:
        """A call; arguments: JSON."""
        call = f'{{"name": {json.dumps(name)}, "{self.keys[0]}": {arguments}}}'
        return call if self.is_bare else f"{self.opening}\n{call}\n{self.closing}"


HERMES = ToolStyle(
    name="hermes", opening="<tool_call>", closing="</tool_call>", keys=("arguments",), is_bare=False
)
LLAMA3 = ToolStyle(
    name="llama3_json", opening="<|python_tag|>", closing="", keys=("parameters", "arguments"), is_bare=True
)
STYLES = (HERMES, LLAMA3)
AUTO, NONE = "auto", "none"  # instead of a style's name


def style_named(name: str) -> ToolStyle:
    """Raises ServerError if there is none."""
    found = next((style for style in STYLES if style.name == name), None)
    if found is None:
        names = ", ".join(style.name for style in STYLES)
        raise ServerError(f"no tool call parser {name!r}", fix=f"give auto, none, {names}")
    return found


class Content(NamedTuple):
    """Text that is no call."""

    text: str


class Call(NamedTuple):
    """arguments: a JSON object."""

    name: str
    arguments: str


Event = Content | Call


class ToolCallParser:
    """Of one answer. names: of the tools that can be called. max_calls: what follows so many is content."""

    def __init__(self, style: ToolStyle, names: frozenset[str], *, max_calls: int | None = None) -> None:
        self.num_calls = 0
        self._style = style
        self._names = names
        self._max_calls = max_calls
        self._text = ""  # from `_start` on, what has not been given out
        self._start = 0
        self._body = self._at = 0  # of what may be a call: where its JSON begins, how far it was looked at
        self._object = _ObjectEnd()
        self._may_be_bare = style.is_bare
        self._state: Callable[[bool], bool] = self._in_text
        self._events: list[Event] = []

    def add(self, piece: str) -> list[Event]:
        """What is certain now."""
        self._text = self._text[self._start :] + piece
        self._body -= self._start
        self._at -= self._start
        self._start = 0
        return self._run(is_end=False)

    def flush(self) -> list[Event]:
        """What was held back, since nothing follows."""
        return self._run(is_end=True)

    def _run(self, *, is_end: bool) -> list[Event]:
        while self._state(is_end):  # has come to another state
            pass
        events, self._events = self._events, []
        return events

    def _in_text(self, is_end: bool) -> bool:
        text, opening = self._text, self._style.opening
        if self._max_calls is not None and self.num_calls >= self._max_calls:
            return self._give(len(text))
        if self._may_be_bare:
            lead = _skip(text, self._start, f"{SPACE};")
            if lead == len(text) and not is_end:
                return False
            self._may_be_bare = False
            if text.startswith("{", lead):
                return self._enter(lead)
        found = text.find(opening, self._start)
        if found < 0:
            return self._give(len(text) - (0 if is_end else _overlap(text, self._start, opening)))
        self._give(found)
        return self._enter(found + len(opening))

    def _enter(self, body: int) -> bool:
        self._body = self._at = body
        self._object = _ObjectEnd()
        self._state = self._in_call
        return True

    def _in_call(self, is_end: bool) -> bool:
        text, end = self._text, self._object
        while self._at < len(text) and end.may_go_on and not end.is_reached:
            end.add(text[self._at])
            self._at += 1
        if end.may_go_on and not end.is_reached and not is_end:
            return False
        call = self._parsed(text[self._body : self._at]) if end.is_reached else None
        if call is None:
            self._give(max(self._body, self._start + 1))  # its opening; what follows may hold another
            self._state = self._in_text
            return True
        self.num_calls += 1
        self._events.append(call)
        self._start = self._at
        self._may_be_bare = self._style.is_bare
        self._state = self._before_closing
        return True

    def _before_closing(self, is_end: bool) -> bool:
        """A closing that does not come is not missed."""
        start, closing = _skip(self._text, self._start, SPACE), self._style.closing
        if self._text.startswith(closing, start):
            self._start = start + len(closing)
        elif closing.startswith(self._text[start:]) and not is_end:
            return False
        self._state = self._in_gap
        return True

    def _in_gap(self, is_end: bool) -> bool:
        self._start = _skip(self._text, self._start, SPACE)
        if self._start == len(self._text):
            return False
        self._state = self._in_text
        return True

    def _give(self, end: int) -> bool:
        """Text up to here is content; there is no more to be done with what there is."""
        if end > self._start:
            self._events.append(Content(self._text[self._start : end]))
            self._start = end
        return False

    def _parsed(self, text: str) -> Call | None:
        """The call, if it is one of a tool that there is."""
        try:
            found = json.loads(text, strict=False)
            name = found.get("name")
            arguments = next((found[key] for key in self._style.keys if key in found), None)
            if not isinstance(name, str) or name not in self._names or not isinstance(arguments, dict):
                return None
            return Call(name, json.dumps(arguments, ensure_ascii=False, allow_nan=False))
        except ValueError:
            return None


class _ObjectEnd:
    """Looks for the end of a JSON object, without regard to its grammar."""

    def __init__(self) -> None:
        self.is_reached = False
        self.may_go_on = True
        self._depth = 0
        self._is_in_string = False
        self._is_escaped = False

    def add(self, character: str) -> None:
        if self._is_in_string:
            self._is_in_string = character != '"' or self._is_escaped
            self._is_escaped = character == "\\" and not self._is_escaped
        elif character not in JSON_CHARACTERS or (not self._depth and character not in "{" + SPACE):
            self.may_go_on = False
        elif character == '"':
            self._is_in_string = True
        elif character in "{[":
            self._depth += 1
            self.may_go_on = self._depth <= MAX_DEPTH
        elif character in "}]":
            self._depth -= 1
            self.is_reached = not self._depth


def _skip(text: str, start: int, characters: str) -> int:
    """The next place where another character is."""
    while start < len(text) and text[start] in characters:
        start += 1
    return start


def _overlap(text: str, start: int, opening: str) -> int:
    """How many characters at the end may be the beginning of the opening."""
    most = min(len(opening) - 1, len(text) - start)
    return next((count for count in range(most, 0, -1) if text.endswith(opening[:count])), 0)
