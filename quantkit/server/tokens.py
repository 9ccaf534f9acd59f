"""`/tokenize` and `/detokenize`: what the model reads, and what ids mean. Shapes are those that vLLM's clients know."""

from typing import Annotated

from pydantic import Field
from typing_extensions import TypedDict

from quantkit.server.chat_schema import Messages, TemplateOptions
from quantkit.server.context import Context
from quantkit.server.errors import invalid
from quantkit.server.schema import Body, Items

MAX_IDS = 1 << 20


class TokenizeBody(Body):
    """A text as it stands, or a conversation in the chat template; one of them."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    chat_template_kwargs: TemplateOptions | None = None


class Tokenized(TypedDict):
    tokens: list[int]
    count: int
    max_model_len: int


class DetokenizeBody(Body):
    model: str | None = None
    tokens: Annotated[Items[int], Field(max_length=MAX_IDS)]


class Detokenized(TypedDict):
    prompt: str


async def tokenize(context: Context, body: TokenizeBody) -> Tokenized:
    """Raises ApiError."""
    model = context.model_for(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise invalid("give either a prompt or messages", param="prompt")
    if body.messages is not None:
        ids = await context.prompts.conversation(model, body.messages, body.chat_template_kwargs)
    else:
        (ids,) = await context.prompts.texts(model.tokenizer, [body.prompt or ""])
    return {"tokens": ids, "count": len(ids), "max_model_len": model.engine.max_model_len}


async def detokenize(context: Context, body: DetokenizeBody) -> Detokenized:
    """Raises ApiError."""
    model = context.model_for(body.model)
    if not all(0 <= token < model.engine.vocab_size for token in body.tokens):
        raise invalid(f"token ids go from 0 to {model.engine.vocab_size - 1}", param="tokens")
    text = await context.prompts.run(
        lambda: model.tokenizer.decode(body.tokens, skip_special_tokens=False), param="tokens"
    )
    return {"prompt": text}
