"""`LLM`: a checkpoint that answers, from Python. Names are those that users of other engines know."""

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from quantkit.errors import GenerationError
from quantkit.formats.checkpoint import open_checkpoint
from quantkit.formats.source import resolve_source
from quantkit.runtime.engine import Event
from quantkit.runtime.models.families import read_spec
from quantkit.runtime.outputs import NewToken, OutputProcessor, RequestOutput
from quantkit.runtime.sampling_params import SamplingParams
from quantkit.runtime.sequence import Sequence as EngineSequence
from quantkit.runtime.settings import EngineSettings
from quantkit.runtime.start import start_engine
from quantkit.runtime.tokenizer import load_tokenizer, stop_tokens

Prompt = str | Sequence[int]
Message = dict[str, Any]
T = TypeVar("T")


class LLM:
    """A model in memory, with its tokenizer.

    model: a folder, hub id, .gguf file or "demo", quantized or not. revision: of a hub id. announce: told, in a line
    each, of downloads and of the plan of a GPU's memory. settings: fields of `EngineSettings`, such as dtype, device,
    kv_cache_dtype, max_model_len. One thread at a time may use it. Raises QuantkitError.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        revision: str | None = None,
        announce: Callable[[str], None] = lambda line: None,
        **settings: Any,
    ) -> None:
        chosen = EngineSettings(**settings)
        checkpoint = open_checkpoint(resolve_source(str(model), revision=revision, announce=announce))
        read_spec(
            checkpoint
        )  # a config.json that is wrong is said to be, before the tokenizer stumbles over it
        self.tokenizer = load_tokenizer(checkpoint.path)
        self._eos_ids = stop_tokens(checkpoint, self.tokenizer)
        self.started = start_engine(checkpoint, chosen, announce=announce)
        self._engine = self.started.engine
        self._outputs = OutputProcessor(self.tokenizer)
        self._sequences: dict[int, EngineSequence] = {}
        self._ready: dict[str, deque[RequestOutput]] = {}  # outputs that nobody has taken, by request
        self._numbers = itertools.count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] = 0,
    ) -> list[RequestOutput]:
        """Continue texts, or token ids, as they are; all at once, results in the order of the prompts.

        sampling_params: for all, or one for each; None: the defaults, greedy. priority: likewise; smaller is served
        first, and keeps its place in the KV cache when that is full.
        """
        encoded = [(prompt, self._encode(prompt)) for prompt in _as_list(prompts)]
        return self._complete(encoded, sampling_params, priority)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] = 0,
    ) -> list[RequestOutput]:
        """Answer conversations in the model's chat template. messages: {"role": …, "content": …}, one or many lists."""
        is_one = not messages or isinstance(messages[0], dict)
        many: Any = [messages] if is_one else messages
        encoded = [(None, self.tokenizer.encode_chat(conversation)) for conversation in many]
        return self._complete(encoded, sampling_params, priority)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, priority: int = 0
    ) -> Iterator[RequestOutput]:
        """Continue one text; each output has what is new. To leave early ends the request."""
        text = prompt if isinstance(prompt, str) else None
        request_id = self._submit(
            text, self._encode(prompt), sampling_params or SamplingParams(), priority, is_streamed=True
        )
        try:
            while True:
                output = self._next(request_id)
                yield output
                if output.finished:
                    return
        finally:
            self._end([request_id])

    def _complete(
        self,
        prompts: Sequence[tuple[Prompt | None, list[int]]],
        params: SamplingParams | Sequence[SamplingParams] | None,
        priority: int | Sequence[int],
    ) -> list[RequestOutput]:
        each_params = _for_each(
            "sampling_params", SamplingParams() if params is None else params, len(prompts)
        )
        each_priority = _for_each("priority", priority, len(prompts))
        request_ids: list[str] = []
        try:
            for (prompt, prompt_ids), its_params, its_priority in zip(
                prompts, each_params, each_priority, strict=True
            ):
                text = prompt if isinstance(prompt, str) else None
                request_ids.append(
                    self._submit(text, prompt_ids, its_params, its_priority, is_streamed=False)
                )
            return [self._next(request_id) for request_id in request_ids]
        finally:
            self._end(request_ids)

    def _submit(
        self,
        text: str | None,
        prompt_ids: list[int],
        params: SamplingParams,
        priority: int,
        *,
        is_streamed: bool,
    ) -> str:
        """Put a request in the engine's queue: a sequence for each of its answers."""
        if type(priority) is not int:
            raise GenerationError(f"priority {priority!r} makes no sense", fix="give a whole number")
        vocab_size = self.started.model.spec.vocab_size
        params.check_token_ids(vocab_size)
        _check_prompt(prompt_ids, vocab_size)
        sequences = [
            EngineSequence(
                sequence_id=number,
                prompt_ids=prompt_ids,
                params=params.answer(index),
                eos_ids=self._eos_ids,
                priority=priority,
                arrival=number,
            )
            for index, number in zip(range(params.n), self._numbers, strict=False)
        ]
        request_id = str(sequences[0].sequence_id)
        self._engine.add(*sequences)
        self._ready[request_id] = deque()
        self._sequences |= {sequence.sequence_id: sequence for sequence in sequences}
        numbers = [sequence.sequence_id for sequence in sequences]
        self._outputs.add(
            request_id, text, prompt_ids, params, numbers, now=time.monotonic(), is_streamed=is_streamed
        )
        return request_id

    def _next(self, request_id: str) -> RequestOutput:
        """What comes next of a request, whoever else has requests in the engine."""
        while not self._ready[request_id]:
            self._step()
        return self._ready[request_id].popleft()

    def _step(self) -> None:
        """One step of the engine, as outputs of its requests."""
        tokens = [_new_token(event) for event in self._engine.step()]
        processed = self._outputs.process(tokens, now=time.monotonic())
        for number in processed.stopped:
            self._engine.end(self._sequences[number])
        for number in [token.sequence_id for token in tokens if token.finish] + processed.stopped:
            del self._sequences[number]
        for output in processed.outputs:
            self._ready[output.request_id].append(output)

    def _end(self, request_ids: Sequence[str]) -> None:
        """Forget requests; those that go on, after an error or an interrupt, or since nobody listens, are ended."""
        for request_id in request_ids:
            self._ready.pop(request_id, None)
            for number in self._outputs.abort(request_id):
                self._engine.end(self._sequences.pop(number))

    def _encode(self, prompt: Prompt) -> list[int]:
        return self.tokenizer.encode_prompt(prompt, raw=True) if isinstance(prompt, str) else list(prompt)


def _check_prompt(prompt_ids: Sequence[int], vocab_size: int) -> None:
    """Raise GenerationError for token ids that the model does not have."""
    wrong = next(
        (token for token in prompt_ids if type(token) is not int or not 0 <= token < vocab_size), None
    )
    if wrong is not None:
        raise GenerationError(
            f"the prompt: {wrong!r} is no token of the model, which has {vocab_size}",
            fix=f"give token ids from 0 to {vocab_size - 1}, or a text",
        )


def _new_token(event: Event) -> NewToken:
    sequence = event.sequence
    return NewToken(sequence.sequence_id, event.token_id, event.finish, event.logprobs, sequence.num_cached)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt, a text or token ids, as a list of one."""
    is_one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
    return list(cast("Sequence[Prompt]", [prompts] if is_one else prompts))


def _for_each(name: str, given: T | Sequence[T], count: int) -> Sequence[T]:
    """One for all, or as many as there are prompts."""
    if not isinstance(given, Sequence):
        return [given] * count
    if len(given) != count:
        raise ValueError(f"{len(given)} {name} for {count} prompts")
    return given
