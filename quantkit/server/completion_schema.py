"""`/v1/completions`: its body and its answers."""

from typing import Literal

from typing_extensions import TypedDict

from quantkit.server.schema import FinishReason, Items, SamplingBody, Usage


class CompletionBody(SamplingBody):
    """prompt: a text or token ids, one or many."""

    prompt: str | Items[str] | Items[int] | Items[Items[int]]
    logprobs: int | None = None


class CompletionLogprobs(TypedDict):
    """A list each over the tokens; text_offset: where in the answer's text the token begins."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class Completion(TypedDict):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
