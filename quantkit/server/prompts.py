"""Texts and conversations to tokens, in threads: the event loop answers others meanwhile."""

import asyncio
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from quantkit.errors import QuantkitError
from quantkit.runtime.structured_outputs import is_deeper
from quantkit.runtime.tokenizer import Tokenizer
from quantkit.server.chat_schema import AnyMessage, AssistantMessage, TemplateOptions, Text, ToolMessage
from quantkit.server.errors import ApiError, invalid
from quantkit.server.lifecycle import ServedModel
from quantkit.server.limits import MAX_PROMPTS, TOKENIZER_THREADS
from quantkit.server.tool_calls import MAX_DEPTH
from quantkit.server.tool_schema import CallMade
from quantkit.server.tools import Conversation, ToolSupport, described

Result = TypeVar("Result")


class Prompts:
    """Owns the threads."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(TOKENIZER_THREADS, thread_name_prefix="tokenizer")

    async def run(self, work: Callable[[], Result], *, param: str) -> Result:
        """The result of work with a tokenizer. Raises ApiError, a 400 about `param`, for a QuantkitError."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        except QuantkitError as error:
            raise invalid(f"{error.problem}; {error.fix}", param=param) from error

    async def conversation(
        self,
        model: ServedModel,
        messages: Sequence[AnyMessage],
        options: TemplateOptions | None,
        tools: Sequence[dict[str, Any]] = (),
    ) -> list[int]:
        """The messages, and tools, in the checkpoint's chat template, up to where the answer begins."""
        told = [_told(message, f"messages[{number}]") for number, message in enumerate(messages)]
        told = _checked(told, model.tools)
        if model.tools is not None and model.tools.describes:
            told, tools = described(told, tools, model.tools.style), ()
        chosen = {} if options is None else options.model_dump(exclude_none=True)
        encode = model.tokenizer.encode_chat
        return await self.run(lambda: encode(told, options=chosen, tools=tools), param="messages")

    async def texts(self, tokenizer: Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
        """Each text as it stands."""
        return await self.run(
            lambda: [tokenizer.encode_prompt(prompt, raw=True) for prompt in prompts], param="prompt"
        )

    def close(self) -> None:
        """Let the threads end."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _told(message: AnyMessage, place: str) -> dict[str, Any]:
    """A message as templates know it; `developer` is a newer name, which they do not know."""
    told: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    told["content"] = _joined(message.content)
    if isinstance(message, ToolMessage):
        told["tool_call_id"] = message.tool_call_id
        told |= {} if message.name is None else {"name": message.name}
    elif isinstance(message, AssistantMessage) and message.tool_calls:
        told["tool_calls"] = [
            _call(call, f"{place}.tool_calls[{number}]") for number, call in enumerate(message.tool_calls)
        ]
    elif message.content is None:
        raise invalid(f"{place}: neither content nor tool_calls", param=f"{place}.content")
    return told


def _joined(content: Text | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text for part in content)


def _call(call: CallMade, place: str) -> dict[str, Any]:
    """With its arguments as an object, which templates write in their own way."""
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict) or is_deeper(arguments, MAX_DEPTH):
        raise invalid(f"{place}: its arguments are no JSON object", param=f"{place}.function.arguments")
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


def _checked(told: Conversation, tools: ToolSupport | None) -> Conversation:
    """The messages. Raises ApiError if they hold calls, of which the template would say nothing."""
    has_calls = any(message["role"] == "tool" or "tool_calls" in message for message in told)
    if has_calls and tools is None:
        raise invalid("this model's chat template does not know tools", param="messages")
    return told


def check_number(num_prompts: int, *, param: str) -> None:
    """Raise ApiError, a 400, for no prompt and for too many."""
    if not 1 <= num_prompts <= MAX_PROMPTS:
        raise invalid(f"{num_prompts} prompts; give 1 to {MAX_PROMPTS}", param=param)


def check_room(
    prompts: Sequence[list[int]], max_tokens: int | None, max_model_len: int, *, param: str
) -> int:
    """Tokens that each answer may have: max_tokens, or what the longest prompt leaves.

    Raises ApiError, a 400, if there is no prompt or not that much room.
    """
    check_number(len(prompts), param=param)
    if not all(prompts):
        raise invalid("a prompt has no tokens", param=param)
    longest = max(map(len, prompts))
    num_most = max_model_len - longest
    if max(1, max_tokens or 1) > num_most:
        answer = f" and {max_tokens} in the answer" if max_tokens else ""
        raise ApiError(
            400,
            f"This model's maximum context length is {max_model_len} tokens. However, you requested {longest} tokens "
            f"in the {param}{answer}. Please reduce one of them.",
            param=param,
            code="context_length_exceeded",
        )
    return num_most if max_tokens is None else max_tokens
