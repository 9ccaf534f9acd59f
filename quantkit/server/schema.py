"""What bodies of both generating endpoints have in common, and the shapes that they share in their answers.

A field that is not here is a 400 that names it: nothing is accepted and then ignored.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from quantkit.runtime.sampling_params import MAX_BIASES
from quantkit.server.limits import MAX_BODY_BYTES, MAX_USER_CHARS

Item = TypeVar("Item")
# A body of 4 MB has room for a million wrong items: an error for each takes seconds of the event loop, and gigabytes.
Items = Annotated[list[Item], Field(fail_fast=True)]


class Body(BaseModel):
    """JSON as it stands: no strings for numbers, no unknown fields, no NaN, no halves of surrogate pairs.

    These are refused wherever a string has a bound, whatever it is: only then does pydantic look at all of it.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, str_max_length=MAX_BODY_BYTES)

    @model_validator(mode="before")
    @classmethod
    def _with_one_unknown_field(cls, given: Any) -> Any:
        """Of the fields that there are not, the first: one error says what is wrong, a million take too long."""
        if not isinstance(given, dict):
            return given
        names = {field.alias or name for name, field in cls.model_fields.items()}
        unknown = next((name for name in given if name not in names), None)
        return {name: value for name, value in given.items() if name in names or name == unknown}


def _few(bias: Any) -> Any:
    if isinstance(bias, dict) and len(bias) > MAX_BIASES:
        raise PydanticCustomError("too_long", f"{len(bias)} token ids; give at most {MAX_BIASES}")
    return bias


Biases = Annotated[dict[str, float], BeforeValidator(_few)]


class StreamOptions(Body):
    include_usage: bool = False


class SamplingBody(Body):
    """Bounds are checked where they are defined, in `SamplingParams`; null is as good as left out."""

    model: str
    max_tokens: int | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: str | Items[str] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Biases | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=MAX_USER_CHARS)] | None = None  # goes into the log
    # beyond OpenAI's
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Items[int] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None


class CachedTokens(TypedDict):
    cached_tokens: int


class Usage(TypedDict):
    """Tokens of all prompts and all answers."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


FinishReason = Literal["stop", "length", "tool_calls"]


class ModelCard(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[ModelCard]
