"""Tools as a model knows them: the style of its calls, who tells it about tools, and the grammar of a call.

The style is the one whose parser reads back what the checkpoint's chat template makes of a call in a conversation. A
template that lists no tools can be helped: with a style chosen by the operator, the server describes them in the system
message.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from quantkit.errors import GenerationError
from quantkit.runtime.structured_outputs import json_rule
from quantkit.runtime.tokenizer import Tokenizer
from quantkit.server.tool_calls import AUTO, NONE, STYLES, Call, ToolCallParser, ToolStyle, style_named
from quantkit.server.tool_schema import Function

PROBE = "probe_of_tools"
NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}

Conversation = list[dict[str, Any]]


class ToolSupport(NamedTuple):
    """How tools are used with a model.

    describes: the server describes them, not the template. marks: ids of tokens that are an opening or a closing.
    skips: the opening is a token without text, unless special tokens are shown.
    """

    style: ToolStyle
    describes: bool
    marks: Mapping[str, int]
    skips: bool

    def __str__(self) -> str:
        return f"{self.style.name}{', described by the server' if self.describes else ''}"


def find_support(tokenizer: Tokenizer, choice: str) -> ToolSupport | None:
    """choice: `auto`, `none` or a style's name. None: no tools. Raises ServerError for another name."""
    if choice == NONE or not tokenizer.has_chat_template:
        return None
    style = _style_of(tokenizer) if choice == AUTO else style_named(choice)
    if style is None:
        return None
    ids = {mark: tokenizer.token_id(mark) for mark in (style.opening, style.closing) if mark}
    skips = tokenizer.decode(tokenizer.encode_prompt(style.opening, raw=True)).find(style.opening) < 0
    marks = {mark: token for mark, token in ids.items() if token is not None}
    return ToolSupport(style, not _lists_tools(tokenizer), marks, skips)


def _style_of(tokenizer: Tokenizer) -> ToolStyle | None:
    """Whose calls the template writes."""
    question = {"role": "user", "content": "?"}
    call = {"type": "function", "id": "call00000", "function": {"name": PROBE, "arguments": {"x": 1}}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    asked = _rendered(tokenizer, [question])
    written = _rendered(tokenizer, [question, answer]).removeprefix(asked)
    for style in STYLES:
        parser = ToolCallParser(style, frozenset({PROBE}))
        if Call(PROBE, '{"x": 1}') in [*parser.add(written), *parser.flush()]:
            return style if _lists_tools(tokenizer) else None
    return None


def _lists_tools(tokenizer: Tokenizer) -> bool:
    return PROBE in _rendered(tokenizer, [{"role": "user", "content": "?"}])


def _rendered(tokenizer: Tokenizer, messages: Conversation) -> str:
    """The conversation and a tool, as the model reads them; nothing if the template does not take them."""
    tool = {"type": "function", "function": {"name": PROBE, "description": "", "parameters": NO_PARAMETERS}}
    try:
        ids = tokenizer.encode_chat(messages, tools=[tool])
    except GenerationError:
        return ""
    return tokenizer.decode(ids, skip_special_tokens=False)


def described(messages: Conversation, tools: Sequence[dict[str, Any]], style: ToolStyle) -> Conversation:
    """The conversation for a template that knows only roles and content: tools and calls as text."""
    plain = [_plain(message, style) for message in messages]
    if not tools:
        return plain
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    example = style.written("NAME", "{…}").replace('"NAME"', "NAME")
    text = f"You may call these functions:\n{listed}\n\nTo call one, answer with its name and arguments:\n{example}"
    if plain[0]["role"] == "system":
        return [{"role": "system", "content": f"{plain[0]['content']}\n\n{text}"}, *plain[1:]]
    return [{"role": "system", "content": text}, *plain]


def _plain(message: dict[str, Any], style: ToolStyle) -> dict[str, Any]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    functions = [call["function"] for call in message.get("tool_calls", ())]
    calls = [
        style.written(each["name"], json.dumps(each["arguments"], ensure_ascii=False)) for each in functions
    ]
    content = "\n".join([*([message["content"]] if message["content"] else []), *calls])
    return {"role": message["role"], "content": content}


class CallGrammar(NamedTuple):
    """Rules of a grammar, among them `calls`, and `text`, which is none; `begun`: calls, perhaps after text."""

    rules: str
    begun: str

    @classmethod
    def of(cls, support: ToolSupport, functions: Sequence[Function], *, is_one: bool) -> "CallGrammar":
        """Raises GenerationError for parameters that are no JSON schema. is_one: and no more calls."""
        style = support.style
        opening, closing = _mark(style.opening, support), _mark(style.closing, support)
        call = "body" if style.is_bare else f'{opening} "\\n" body "\\n" {closing}'
        more = "" if is_one else f" ({json.dumps('; ' if style.is_bare else chr(10))} call)*"
        bodies = " | ".join(f"body{number}" for number in range(len(functions)))
        rules = [
            f"calls: call{more}",
            f"call: {call}",
            f"body: {bodies}",
            f"text: TEXT\nTEXT: {_text(style)}",
        ]
        for number, function in enumerate(functions):
            head = json.dumps(f'{{"name": {json.dumps(function.name)}, "{style.keys[0]}": ')
            schema = NO_PARAMETERS if function.parameters is None else function.parameters
            rules.append(f'body{number}: {head} arguments{number} "}}"')
            rules.append(f"arguments{number}: {json_rule(schema, is_lenient=not function.strict)}")
        begun = "text? calls" if style.opening in support.marks and not style.is_bare else "calls"
        return cls("\n".join(rules), begun)


def _mark(mark: str, support: ToolSupport) -> str:
    """As a token, where it is one: the model has never seen it in others."""
    return f"<[{support.marks[mark]}]>" if mark in support.marks else json.dumps(mark)


def _text(style: ToolStyle) -> str:
    """Any text in which the parser finds no call."""
    opening = style.opening.replace("|", r"\|")
    bare = r" & ~/[ \t\n\r;]*\{(.|\n)*/" if style.is_bare else ""
    return rf"/(.|\n)+/ & ~/(.|\n)*{opening}(.|\n)*/{bare}"
