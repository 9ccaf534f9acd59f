"""`LLM`: a checkpoint that answers, from Python. Names are those that users of other engines know."""

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar, cast

from quantkit.errors import GenerationError
from quantkit.formats.checkpoint import Checkpoint, open_checkpoint
from quantkit.formats.source import resolve_source
from quantkit.runtime.models.families import read_spec
from quantkit.runtime.outputs import RequestOutput
from quantkit.runtime.requests import Requests
from quantkit.runtime.sampling_params import SamplingParams
from quantkit.runtime.settings import EngineSettings
from quantkit.runtime.start import start_engine
from quantkit.runtime.tokenizer import load_tokenizer, stop_tokens

Prompt = str | Sequence[int]
Message = dict[str, Any]
T = TypeVar("T")


class LLM:
    """A model in memory, with its tokenizer.

    model: a folder, hub id, .gguf file or "demo", quantized or not, or a checkpoint that is open. revision: of a hub
    id. announce: told, in a line each, of downloads and of the plan of a GPU's memory. settings: fields of
    `EngineSettings`, such as dtype, device, kv_cache_dtype, max_model_len. Any thread may use it; steps, one at a time,
    compute the requests of all.
    Raises QuantkitError.
    """

    def __init__(
        self,
        model: str | Path | Checkpoint,
        *,
        revision: str | None = None,
        announce: Callable[[str], None] = lambda line: None,
        **settings: Any,
    ) -> None:
        chosen = EngineSettings(**settings)
        if isinstance(model, str | Path):
            model = open_checkpoint(resolve_source(str(model), revision=revision, announce=announce))
        checkpoint = model
        # a wrong config.json is said to be, before the tokenizer stumbles over it
        spec = read_spec(checkpoint)
        with ThreadPoolExecutor(1) as beside:  # to import transformers takes as long as to load weights
            tokenizer = beside.submit(load_tokenizer, checkpoint.path)
            self.started = start_engine(checkpoint, chosen, announce=announce)
            self.tokenizer = tokenizer.result()
        eos_ids = stop_tokens(checkpoint, self.tokenizer, vocab_size=spec.vocab_size)
        self.requests = Requests(
            self.started.engine,
            self.tokenizer,
            eos_ids=eos_ids,
            vocab_size=spec.vocab_size,
        )
        # by request: outputs that nobody has taken, also of others that share the queue
        self._ready: dict[str, deque[RequestOutput]] = {}
        self._numbers = itertools.count()
        self._lock = threading.RLock()  # a stream that is collected ends itself wherever its thread is

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

    def as_completed(
        self,
        prompts: Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int | Sequence[int] = 0,
    ) -> Iterator[tuple[int, RequestOutput]]:
        """Like `generate`: each output once it is there, with its prompt's number. To leave early ends the rest."""
        encoded = [(prompt, self._encode(prompt)) for prompt in prompts]
        return self._outputs(encoded, sampling_params, priority)

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
        params = sampling_params or SamplingParams()
        request_id = str(next(self._numbers))
        try:
            ready: deque[RequestOutput] = deque()
            self._submit(request_id, ready, text, self._encode(prompt), params, priority, is_streamed=True)
            while True:
                output = self._next(ready)
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
        outputs = dict(self._outputs(prompts, params, priority))
        return [outputs[number] for number in range(len(prompts))]

    def _outputs(
        self,
        prompts: Sequence[tuple[Prompt | None, list[int]]],
        params: SamplingParams | Sequence[SamplingParams] | None,
        priority: int | Sequence[int],
    ) -> Iterator[tuple[int, RequestOutput]]:
        each_params = _for_each(
            "sampling_params", SamplingParams() if params is None else params, len(prompts)
        )
        each_priority = _for_each("priority", priority, len(prompts))
        request_ids = {str(next(self._numbers)): number for number in range(len(prompts))}
        ready: deque[RequestOutput] = deque()
        try:
            for request_id, (prompt, prompt_ids), its_params, its_priority in zip(
                request_ids, prompts, each_params, each_priority, strict=True
            ):
                text = prompt if isinstance(prompt, str) else None
                self._submit(request_id, ready, text, prompt_ids, its_params, its_priority, is_streamed=False)
            for _ in prompts:
                output = self._next(ready)
                yield request_ids[output.request_id], output
        finally:
            self._end(request_ids)

    def _submit(
        self,
        request_id: str,
        ready: deque[RequestOutput],
        text: str | None,
        prompt_ids: list[int],
        params: SamplingParams,
        priority: int,
        *,
        is_streamed: bool,
    ) -> None:
        with self._lock:
            self._ready[request_id] = ready
            self.requests.add(
                request_id, text, prompt_ids, params, priority=priority, is_streamed=is_streamed
            )

    def _next(self, ready: deque[RequestOutput]) -> RequestOutput:
        """What comes next of the requests that share it, whoever else has requests in the engine."""
        while True:
            with self._lock:
                if ready:
                    return ready.popleft()
                self._step()

    def _step(self) -> None:
        if not self.requests.has_work:
            raise GenerationError("an interrupt of another request ended this one", fix="send it again")
        for output in self.requests.step().outputs:
            if output.request_id in self._ready:  # not where ending it was interrupted
                self._ready[output.request_id].append(output)

    def _end(self, request_ids: Iterable[str]) -> None:
        """Forget requests; those that go on, after an error or an interrupt, or since nobody listens, are ended."""
        with self._lock:
            for request_id in request_ids:
                self._ready.pop(request_id, None)
                self.requests.end(request_id)

    def _encode(self, prompt: Prompt) -> list[int]:
        return self.tokenizer.encode_prompt(prompt, raw=True) if isinstance(prompt, str) else list(prompt)


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
