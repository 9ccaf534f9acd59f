"""Texts and conversations to tokens, in threads: the event loop answers others meanwhile."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from quantkit.errors import QuantkitError
from quantkit.runtime.tokenizer import Tokenizer
from quantkit.server.chat_schema import Message, TemplateOptions
from quantkit.server.errors import ApiError, invalid
from quantkit.server.limits import MAX_PROMPTS, TOKENIZER_THREADS

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
        self, tokenizer: Tokenizer, messages: Sequence[Message], options: TemplateOptions | None
    ) -> list[int]:
        """The messages in the checkpoint's chat template, up to where the answer begins."""
        plain = [{"role": _role(message), "content": message.text()} for message in messages]
        chosen = {} if options is None else options.model_dump(exclude_none=True)
        return await self.run(lambda: tokenizer.encode_chat(plain, options=chosen), param="messages")

    async def texts(self, tokenizer: Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
        """Each text as it stands."""
        return await self.run(
            lambda: [tokenizer.encode_prompt(prompt, raw=True) for prompt in prompts], param="prompt"
        )

    def close(self) -> None:
        """Let the threads end."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _role(message: Message) -> str:
    """`developer` is a newer name, which templates do not know."""
    return "system" if message.role == "developer" else message.role


def check_room(
    prompts: Sequence[list[int]], max_tokens: int | None, max_model_len: int, *, param: str
) -> int:
    """Tokens that each answer may have: max_tokens, or what the longest prompt leaves.

    Raises ApiError, a 400, if there is no prompt or not that much room.
    """
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise invalid(f"{len(prompts)} prompts; give 1 to {MAX_PROMPTS}", param=param)
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
