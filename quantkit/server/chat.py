"""`/v1/chat/completions`: the next message of a conversation."""

import time
import uuid
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request

from quantkit.server.answers import Answer
from quantkit.server.chat_schema import (
    ChatBody,
    ChatLogprobs,
    TokenLogprob,
    TopLogprob,
)
from quantkit.server.context import Context, usage_of
from quantkit.server.errors import invalid
from quantkit.server.generation import Generation
from quantkit.server.messages import Choice, ChosenToken
from quantkit.server.prompts import check_room
from quantkit.server.sampling import sampling_params

FINISH_REASONS = {"stop": "stop", "length": "length", "context": "length", None: None}


async def answer_chat(context: Context, body: ChatBody, request: Request) -> Answer:
    """Start to answer. Raises ApiError for what cannot be answered, or not now."""
    model = context.model_for(body.model)
    prompt_ids = await context.prompts.conversation(model.tokenizer, body.messages, body.chat_template_kwargs)
    max_tokens = check_room([prompt_ids], _max_tokens(body), model.engine.max_model_len, param="messages")
    num_likeliest = _num_likeliest(body)
    params = sampling_params(body, model, max_tokens=max_tokens, logprobs=num_likeliest)
    shape = ChatShape(model.name, num_likeliest or 0)
    return context.answer(request, body, [prompt_ids], params, shape)


def _max_tokens(body: ChatBody) -> int | None:
    """By its old or its new name."""
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise invalid("max_tokens and max_completion_tokens differ; give one of them", param="max_tokens")
    return body.max_completion_tokens if body.max_tokens is None else body.max_tokens


def _num_likeliest(body: ChatBody) -> int | None:
    if not body.logprobs:
        if body.top_logprobs is not None:
            raise invalid("top_logprobs needs logprobs to be true", param="top_logprobs")
        return None
    return body.top_logprobs or 0


class ChatShape:
    """Choices as OpenAI's objects, of one request."""

    def __init__(self, model: str, num_likeliest: int) -> None:
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._num_likeliest = num_likeliest
        self._begun: set[int] = set()

    def whole(self, choices: list[Choice], generation: Generation) -> dict[str, Any]:
        """The answer that is not streamed."""
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [self._choice(choice) for choice in choices],
            "usage": usage_of(generation),
        }

    def pieces(self, choices: list[Choice]) -> list[dict[str, Any]]:
        """Chunks of a stream: of each choice its role first, its finish reason last."""
        chunks = []
        for choice in choices:
            if choice.number not in self._begun:
                self._begun.add(choice.number)
                chunks.append(
                    self._piece(choice.number, {"role": "assistant", "content": "", "refusal": None})
                )
            if choice.text or choice.tokens:
                logprobs = self._logprobs(choice.tokens)
                chunks.append(self._piece(choice.number, {"content": choice.text}, logprobs=logprobs))
            if choice.finish_reason is not None:
                reason = FINISH_REASONS[choice.finish_reason]
                chunks.append(self._piece(choice.number, {}, finish_reason=reason))
        return chunks

    def usage(self, generation: Generation) -> dict[str, Any]:
        """The chunk after the last."""
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage_of(generation)}

    def _choice(self, choice: Choice) -> dict[str, Any]:
        return {
            "index": choice.number,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": self._logprobs(choice.tokens),
            "finish_reason": FINISH_REASONS[choice.finish_reason],
        }

    def _piece(
        self,
        index: int,
        delta: dict[str, Any],
        *,
        logprobs: ChatLogprobs | None = None,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}

    def _logprobs(self, tokens: Sequence[ChosenToken] | None) -> ChatLogprobs | None:
        if tokens is None:
            return None
        return {"content": [self._token(token) for token in tokens], "refusal": None}

    def _token(self, token: ChosenToken) -> TokenLogprob:
        likeliest = token.likeliest[: self._num_likeliest]
        return {
            **_logprob(token.text, token.logprob),
            "top_logprobs": [_logprob(text, value) for text, value in likeliest],
        }


def _logprob(text: str | bytes, value: float) -> TopLogprob:
    encoded = text if isinstance(text, bytes) else text.encode()
    return {"token": token_name(text), "logprob": value, "bytes": list(encoded)}


def token_name(text: str | bytes) -> str:
    """A token as a string; one that is no whole character as its bytes."""
    return text if isinstance(text, str) else "bytes:" + "".join(f"\\x{byte:02x}" for byte in text)
