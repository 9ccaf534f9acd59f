"""`/v1/chat/completions`: the next message of a conversation."""

import itertools
import time
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

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
from quantkit.server.structure import RequestedTools, requested_tools, structure_of
from quantkit.server.tool_calls import Call, Content, ToolCallParser
from quantkit.server.tool_schema import AnswerCall, AnswerFunction

FINISH_REASONS = {"stop": "stop", "length": "length", "context": "length", None: None}


async def answer_chat(context: Context, body: ChatBody, request: Request) -> Answer:
    """Start to answer. Raises ApiError for what cannot be answered, or not now."""
    model = context.model_for(body.model)
    tools = requested_tools(body, model.tools)
    structure = structure_of(body, tools)
    if structure is not None:
        await context.grammars.check(structure, param="response_format" if tools is None else "tools")
    listed = [] if tools is None else tools.listed()
    prompt_ids = await context.prompts.conversation(model, body.messages, body.chat_template_kwargs, listed)
    max_tokens = check_room([prompt_ids], _max_tokens(body), model.engine.max_model_len, param="messages")
    num_likeliest = _num_likeliest(body)
    params = sampling_params(
        body,
        model,
        max_tokens=max_tokens,
        logprobs=num_likeliest,
        structure=structure,
        shows_special_tokens=tools is not None and tools.support.skips,
    )
    shape = ChatShape(model.name, num_likeliest or 0, tools)
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


class NumberedCall(NamedTuple):
    """A call, and which of its answer's it is."""

    number: int
    call: Call


class ChatShape:
    """Choices as OpenAI's objects, of one request. tools: None: a text is a text."""

    def __init__(self, model: str, num_likeliest: int, tools: RequestedTools | None) -> None:
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._num_likeliest = num_likeliest
        self._tools = tools
        self._parsers: dict[int, ToolCallParser | None] = {}  # of the choices that have begun

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
            number = choice.number
            if number not in self._parsers:
                chunks.append(self._piece(number, {"role": "assistant", "content": "", "refusal": None}))
            deltas: list[dict[str, Any]] = [_delta(event) for event in self._events(choice)]
            if choice.tokens and not deltas:
                deltas = [{}]
            for place, delta in enumerate(deltas):
                logprobs = None if place else self._logprobs(choice.tokens)
                chunks.append(self._piece(number, delta, logprobs=logprobs))
            if choice.finish_reason is not None:
                chunks.append(self._piece(number, {}, finish_reason=self._finish_reason(choice)))
        return chunks

    def usage(self, generation: Generation) -> dict[str, Any]:
        """The chunk after the last."""
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage_of(generation)}

    def _choice(self, choice: Choice) -> dict[str, Any]:
        events = self._events(choice)
        content = "".join(event.text for event in events if isinstance(event, Content))
        calls = [_call(event) for event in events if isinstance(event, NumberedCall)]
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message |= {"content": content or None, "tool_calls": calls}
        return {
            "index": choice.number,
            "message": message,
            "logprobs": self._logprobs(choice.tokens),
            "finish_reason": self._finish_reason(choice),
        }

    def _events(self, choice: Choice) -> list[Content | NumberedCall]:
        """A choice's new text, calls with their numbers; for a stream's pieces together as for a whole text."""
        if choice.number not in self._parsers:
            self._parsers[choice.number] = None if self._tools is None else self._tools.parser()
        parser = self._parsers[choice.number]
        if parser is None:
            return [Content(choice.text)] if choice.text else []
        before = parser.num_calls
        events = parser.add(choice.text)
        if choice.finish_reason is not None:
            events += parser.flush()
        numbers = itertools.count(before)
        return [
            event if isinstance(event, Content) else NumberedCall(next(numbers), event) for event in events
        ]

    def _finish_reason(self, choice: Choice) -> str | None:
        """A call that the model has chosen to make is a reason of its own."""
        reason = FINISH_REASONS[choice.finish_reason]
        parser = self._parsers[choice.number]
        if reason != "stop" or parser is None or self._tools is None or self._tools.is_named:
            return reason
        return "tool_calls" if parser.num_calls else reason

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


def _delta(event: Content | NumberedCall) -> dict[str, Any]:
    if isinstance(event, Content):
        return {"content": event.text}
    return {"tool_calls": [{"index": event.number, **_call(event)}]}


def _call(numbered: NumberedCall) -> AnswerCall:
    name, arguments = numbered.call
    function: AnswerFunction = {"name": name, "arguments": arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def _logprob(text: str | bytes, value: float) -> TopLogprob:
    encoded = text if isinstance(text, bytes) else text.encode()
    return {"token": token_name(text), "logprob": value, "bytes": list(encoded)}


def token_name(text: str | bytes) -> str:
    """A token as a string; one that is no whole character as its bytes."""
    return text if isinstance(text, str) else "bytes:" + "".join(f"\\x{byte:02x}" for byte in text)
