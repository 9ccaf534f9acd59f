"""`/v1/chat/completions`: its body and its answers."""

from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from quantkit.runtime.sampling_params import MAX_LOGPROBS
from quantkit.server.limits import MAX_MESSAGES
from quantkit.server.schema import Body, FinishReason, Items, SamplingBody, Usage
from quantkit.server.tool_schema import AnswerCall, CallMade, ToolChoice, Tools


class TextPart(Body):
    type: Literal["text"]
    text: str


Text = str | Items[TextPart]


class Message(Body):
    role: Literal["system", "developer", "user"]
    content: Text


class AssistantMessage(Body):
    """As answers have it that clients send back: content may be null if there are calls.

    What else OpenAI's have is empty: `model_dump()` of its client writes all of it.
    """

    role: Literal["assistant"]
    content: Text | None = None
    refusal: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Items[CallMade] | None = None


class ToolMessage(Body):
    """What a call has brought. name: of the tool, which some templates ask for."""

    role: Literal["tool"]
    content: Text
    tool_call_id: str
    name: str | None = None


AnyMessage = Annotated[Message | AssistantMessage | ToolMessage, Field(discriminator="role")]
Messages = Annotated[Items[AnyMessage], Field(min_length=1, max_length=MAX_MESSAGES)]


class TextFormat(Body):
    type: Literal["text"]


class JsonObjectFormat(Body):
    type: Literal["json_object"]


class JsonSchema(Body):
    """strict: what cannot be enforced is refused, instead of left out."""

    name: str
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class JsonSchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class TemplateOptions(Body):
    """What may be told to a chat template, and nothing else."""

    enable_thinking: bool | None = None


class ChatBody(SamplingBody):
    messages: Messages
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: TemplateOptions | None = None


class TopLogprob(TypedDict):
    """token: `bytes:\\x…` where it is no whole character."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    content: list[TokenLogprob]
    refusal: None


class AnswerMessage(TypedDict):
    """content: null if there is nothing but calls."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: NotRequired[list[AnswerCall]]


class ChatChoice(TypedDict):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(TypedDict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
