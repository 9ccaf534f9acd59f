"""What a chat body asks of the form of its answers: JSON, calls of tools, or both, as one grammar."""

from dataclasses import dataclass
from typing import Any

from quantkit.errors import GenerationError
from quantkit.runtime.grammar import FREE_TOKENS
from quantkit.runtime.structured_outputs import StructuredOutputsParams, json_rule
from quantkit.server.chat_schema import ChatBody, JsonObjectFormat, JsonSchemaFormat, ResponseFormat
from quantkit.server.errors import invalid
from quantkit.server.tool_calls import ToolCallParser
from quantkit.server.tool_schema import Function, NamedTool
from quantkit.server.tools import CallGrammar, ToolSupport


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestedTools:
    """The functions that may be called. is_forced: one has to be. is_named: by the client. is_one: and no more."""

    support: ToolSupport
    functions: list[Function]
    is_forced: bool
    is_named: bool
    is_one: bool

    def parser(self) -> ToolCallParser:
        """For one answer."""
        names = frozenset(function.name for function in self.functions)
        return ToolCallParser(self.support.style, names, max_calls=1 if self.is_one else None)

    def listed(self) -> list[dict[str, Any]]:
        """For the model."""
        fields = ("name", "description", "parameters")
        found = [function.model_dump(include=set(fields), exclude_none=True) for function in self.functions]
        return [{"type": "function", "function": {"parameters": {}, **each}} for each in found]

    @property
    def has_grammar(self) -> bool:
        """Whether calls follow one; else the model is left to itself."""
        return self.is_forced or any(function.strict for function in self.functions)


def requested_tools(body: ChatBody, support: ToolSupport | None) -> RequestedTools | None:
    """The tools of a request; None: it has none, or wants no calls. Raises ApiError, a 400."""
    choice = body.tool_choice or ("auto" if body.tools else "none")
    if not body.tools:
        for name in ("tool_choice", "parallel_tool_calls"):
            if getattr(body, name) is not None:
                raise invalid(f"{name} needs tools", param=name)
        return None
    functions = [tool.function for tool in body.tools]
    names = [function.name for function in functions]
    if len(set(names)) < len(names):
        raise invalid("two tools have the same name", param="tools")
    for place, function in enumerate(functions):
        if (function.parameters or {}).get("type", "object") != "object":
            raise invalid(
                f"the parameters of {function.name!r} are no object: give a schema of type 'object'",
                param=f"tools[{place}].function.parameters",
            )
    if choice == "none":
        return None
    if support is None:
        raise invalid(
            "this model's chat template does not know tools; the operator can have the server describe them with "
            "--tool-call-parser",
            param="tools",
        )
    is_named = isinstance(choice, NamedTool)
    if isinstance(choice, NamedTool):
        functions = [function for function in functions if function.name == choice.function.name]
        if not functions:
            raise invalid(f"there is no tool {choice.function.name[:80]!r}", param="tool_choice")
    return RequestedTools(
        support=support,
        functions=functions,
        is_forced=is_named or choice == "required",
        is_named=is_named,
        is_one=is_named or body.parallel_tool_calls is False,
    )


def structure_of(body: ChatBody, tools: RequestedTools | None) -> StructuredOutputsParams | None:
    """The grammar of an answer; None: any text. Raises ApiError, a 400, for schemas that are none."""
    answer = _answer_rule(body.response_format)
    if tools is None or not (tools.has_grammar or answer):
        return None if answer is None else _params(f"start: answer\n{answer}", param="response_format")
    try:
        calls = CallGrammar.of(tools.support, tools.functions, is_one=tools.is_one)
    except GenerationError as error:
        raise invalid(f"{error.problem}; {error.fix}", param="tools") from error
    if tools.is_forced:
        start = "start: calls"
    elif answer is not None:
        start = f"start: answer | calls\n{answer}"
    else:
        start = f"start: text? | {calls.begun}"
    return _params(f"{start}\n{calls.rules}", param="tools")


def _answer_rule(wanted: ResponseFormat | None) -> str | None:
    match wanted:
        case JsonObjectFormat():
            return f"answer: {json_rule({'type': 'object'})}"
        case JsonSchemaFormat(json_schema=named):
            try:
                schema = {} if named.schema_ is None else named.schema_
                return f"answer: {json_rule(schema, is_lenient=not named.strict)}"
            except GenerationError as error:
                raise invalid(f"{error.problem}; {error.fix}", param="response_format") from error
        case _:
            return None


def _params(grammar: str, *, param: str) -> StructuredOutputsParams:
    try:
        return StructuredOutputsParams(grammar=f"{FREE_TOKENS}{grammar}\n")
    except GenerationError as error:
        raise invalid(f"{error.problem}; {error.fix}", param=param) from error
