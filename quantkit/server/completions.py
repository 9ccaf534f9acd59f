"""`/v1/completions`: texts, or token ids, continued as they stand."""

import time
import uuid
from collections.abc import Sequence
from typing import Any, cast

from starlette.requests import Request

from quantkit.server.answers import Answer
from quantkit.server.chat import FINISH_REASONS, token_name
from quantkit.server.completion_schema import CompletionBody, CompletionLogprobs
from quantkit.server.context import Context, usage_of
from quantkit.server.errors import invalid
from quantkit.server.generation import Generation
from quantkit.server.lifecycle import ServedModel
from quantkit.server.messages import Choice, ChosenToken
from quantkit.server.prompts import check_number, check_room
from quantkit.server.sampling import sampling_params

MAX_TOKENS = 16  # OpenAI's default


async def answer_completion(context: Context, body: CompletionBody, request: Request) -> Answer:
    """Start to answer. Raises ApiError for what cannot be answered, or not now."""
    model = context.model_for(body.model)
    prompts = await _prompt_ids(context, model, body)
    max_tokens = MAX_TOKENS if body.max_tokens is None else body.max_tokens
    max_tokens = check_room(prompts, max_tokens, model.engine.max_model_len, param="prompt")
    params = sampling_params(body, model, max_tokens=max_tokens, logprobs=body.logprobs)
    shape = CompletionShape(model.name, body.logprobs or 0)
    return context.answer(request, body, prompts, params, shape)


async def _prompt_ids(context: Context, model: ServedModel, body: CompletionBody) -> list[list[int]]:
    """The prompts as token ids that the model has."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return await context.prompts.texts(model.tokenizer, [prompt])
    if prompt and not isinstance(prompt[0], int):
        check_number(len(prompt), param="prompt")  # before all of them are tokenized
    if prompt and isinstance(prompt[0], str):
        return await context.prompts.texts(model.tokenizer, prompt)
    given = [prompt] if prompt and isinstance(prompt[0], int) else prompt
    prompts = cast("list[list[int]]", given)
    vocab_size = model.engine.vocab_size
    if not all(0 <= token < vocab_size for ids in prompts for token in ids):
        raise invalid(f"token ids go from 0 to {vocab_size - 1}", param="prompt")
    return prompts


class CompletionShape:
    """Choices as OpenAI's objects, of one request."""

    def __init__(self, model: str, num_likeliest: int) -> None:
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._num_likeliest = num_likeliest
        self._offsets: dict[int, int] = {}  # by choice, where its next token begins

    def whole(self, choices: list[Choice], generation: Generation) -> dict[str, Any]:
        """The answer that is not streamed."""
        return {
            **self._head,
            "choices": [self._choice(choice) for choice in choices],
            "usage": usage_of(generation),
        }

    def pieces(self, choices: list[Choice]) -> list[dict[str, Any]]:
        """Chunks of a stream, one for each choice."""
        return [
            {**self._head, "choices": [self._choice(choice)]}
            for choice in choices
            if choice.text or choice.tokens or choice.finish_reason is not None
        ]

    def usage(self, generation: Generation) -> dict[str, Any]:
        """The chunk after the last."""
        return {**self._head, "choices": [], "usage": usage_of(generation)}

    def _choice(self, choice: Choice) -> dict[str, Any]:
        return {
            "index": choice.number,
            "text": choice.text,
            "logprobs": None if choice.tokens is None else self._logprobs(choice.number, choice.tokens),
            "finish_reason": FINISH_REASONS[choice.finish_reason],
        }

    def _logprobs(self, index: int, tokens: Sequence[ChosenToken]) -> CompletionLogprobs:
        offsets = []
        for token in tokens:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + _num_characters(token.text)
        return {
            "tokens": [token_name(token.text) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [
                {token_name(text): value for text, value in token.likeliest} for token in tokens
            ],
            "text_offset": offsets,
        }


def _num_characters(text: str | bytes) -> int:
    """Those that begin in a token."""
    if isinstance(text, str):
        return len(text)
    return sum(byte & 0xC0 != 0x80 for byte in text)  # UTF-8's other bytes continue one
