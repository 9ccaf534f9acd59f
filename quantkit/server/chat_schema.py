"""`/v1/chat/completions`: its body and its answers."""

from typing import Annotated, Literal

from pydantic import Field
from typing_extensions import TypedDict

from quantkit.server.limits import MAX_MESSAGES
from quantkit.server.schema import Body, FinishReason, SamplingBody, Usage


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    """refusal: null, as answers have it that clients send back."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    refusal: None = None

    def text(self) -> str:
        """Its parts as one."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]


class ResponseFormat(Body):
    type: Literal["text"]


class TemplateOptions(Body):
    """What may be told to a chat template, and nothing else."""

    enable_thinking: bool | None = None


class ChatBody(SamplingBody):
    messages: Messages
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: ResponseFormat | None = None
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
    role: Literal["assistant"]
    content: str
    refusal: None


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


class ChatDelta(TypedDict, total=False):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChunkChoice(TypedDict):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
