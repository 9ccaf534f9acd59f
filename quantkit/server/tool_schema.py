"""Tools in bodies and answers of `/v1/chat/completions`."""

from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import TypedDict

from quantkit.server.limits import MAX_TOOLS
from quantkit.server.schema import Body, Items

ToolName = Annotated[str, Field(pattern="^[a-zA-Z0-9_.-]{1,64}$")]


class Function(Body):
    """parameters: a JSON schema; none: there are no parameters. strict: a call follows it exactly."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


Tools = Annotated[Items[Tool], Field(max_length=MAX_TOOLS)]
ToolChoice = Literal["none", "auto", "required"] | NamedTool


class CalledFunction(Body):
    """arguments: a JSON object, as a text."""

    name: str
    arguments: str


class CallMade(Body):
    """As answers have it, sent back."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class AnswerFunction(TypedDict):
    name: str
    arguments: str


class AnswerCall(TypedDict):
    id: str
    type: Literal["function"]
    function: AnswerFunction
