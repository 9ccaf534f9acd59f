"""The engine process, seen from the HTTP process: given a model and requests, listened to, missed when it dies."""

import asyncio
import dataclasses
import itertools
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from quantkit.errors import ServerError
from quantkit.runtime.sampling_params import SamplingParams
from quantkit.runtime.settings import EngineSettings
from quantkit.server.admission import Admission
from quantkit.server.errors import ApiError, engine_died, failed, invalid
from quantkit.server.generation import Generation
from quantkit.server.logs import logger
from quantkit.server.messages import (
    Abort,
    CannotStart,
    Decoder,
    Delta,
    Failed,
    Message,
    Ping,
    Progress,
    Ready,
    Refused,
    Start,
    Stepped,
    Submit,
    encode,
)
from quantkit.server.metrics import Metrics


class EngineClient(asyncio.Protocol):
    """Messages to the engine process, and its messages to the generations that they are about.

    idle: set while it works on nothing. died: set at the end of the engine's socket; every generation has ended then.
    """

    def __init__(self, admission: Admission, metrics: Metrics, end: socket.socket) -> None:
        self.died = asyncio.Event()
        self.idle = asyncio.Event()
        self.idle.set()
        self._admission = admission
        self._metrics = metrics
        self._decoder = Decoder()
        self._numbers = itertools.count()
        self._generations: dict[str, Generation] = {}  # by the parts that the engine works on
        self._open: set[Generation] = set()
        self._ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self._heard = asyncio.Event()
        self._transport: asyncio.Transport | None = None
        self._end = end

    async def start(self, model: Path, settings: EngineSettings) -> Ready:
        """Have it load a model and wait until it has. Raises ServerError for what the engine cannot start with."""
        await self.connect()
        self._send(Start(str(model), dataclasses.asdict(settings)))
        return await self._ready

    async def connect(self) -> None:
        """Talk over the socket with whoever holds its other end."""
        self._transport, _ = await asyncio.get_running_loop().create_connection(lambda: self, sock=self._end)

    async def answers(self, seconds: float | None) -> bool:
        """Whether the engine's loop says anything within so long; None: however long it takes."""
        self._heard.clear()
        if seconds is not None:
            self._send(Ping())
        try:
            return await asyncio.wait_for(self._heard.wait(), seconds)
        except TimeoutError:
            return False

    def submit(
        self,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        *,
        arrival: float,
        is_streamed: bool,
    ) -> Generation:
        """Give the engine `params.n` answers to each prompt to make. Raises ApiError if too much waits, or it is dead.

        Whoever calls this calls `end`, too.
        """
        if self.died.is_set():
            raise engine_died()
        generation = Generation(
            next(self._numbers),
            [len(prompt) for prompt in prompts],
            arrival=arrival,
            num_answers=params.n,
            is_streamed=is_streamed,
        )
        fields = dataclasses.asdict(params)
        pairs = zip(generation.parts, prompts, strict=True)
        messages = [encode(Submit(part, prompt, fields)) for part, prompt in pairs]
        self._admission.admit(generation.num_choices, generation.num_prompt_tokens)
        self._open.add(generation)
        self.idle.clear()
        self._generations |= dict.fromkeys(generation.parts, generation)
        self._write(b"".join(messages))
        return generation

    def end(self, generation: Generation) -> None:
        """Nobody wants more of it: what still runs is aborted, what was counted is given back."""
        for part in generation.parts:
            if self._generations.pop(part, None) is not None and part in generation.unfinished:
                self._send(Abort(part))
        if generation in self._open:
            self._open.remove(generation)
            self._admission.begun(sum(generation.waiting.values()))
            self._admission.ended(generation.num_choices)
        if not self._open:
            self.idle.set()

    def fail_all(self, error: ApiError) -> None:
        """End every generation with an error."""
        for generation in self._open:
            generation.fail(error)

    def close(self) -> None:
        """Close the socket, by which the process ends."""
        if self._transport is not None:
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        self._heard.set()
        for message in self._decoder.feed(data):
            self._take(message)

    def connection_lost(self, error: Exception | None) -> None:
        if not self._ready.done():
            self._ready.set_exception(
                ServerError(
                    "the engine process died while it loaded the model", fix="see its traceback above"
                )
            )
        self.fail_all(engine_died())
        self.died.set()

    def _send(self, message: Message) -> None:
        self._write(encode(message))

    def _write(self, encoded: bytes) -> None:
        assert self._transport is not None, "it is started first"
        if not self._transport.is_closing():
            self._transport.write(encoded)

    def _take(self, message: Message) -> None:
        match message:
            case Stepped(begun, began, deltas, stats):
                self._metrics.stepped(stats)
                for part in begun:
                    if (generation := self._generations.get(part)) is not None:
                        self._begin(generation, part, began)
                now = time.monotonic()
                for delta in deltas:
                    self._put(delta, now)
            case Refused(part, problem, fix):
                if (generation := self._generations.get(part)) is not None:
                    generation.fail(invalid(f"{problem}; {fix}"))
            case Failed(part, problem):
                if (generation := self._generations.get(part)) is not None:
                    generation.fail(failed(problem, "out_of_memory"))
            case Progress(line):
                logger.info(line)
            case Ready():
                self._ready.set_result(message)
            case CannotStart(problem, fix):
                self._ready.set_exception(ServerError(problem, fix=fix))
            case _:
                raise AssertionError(f"{type(message).__name__} is not from the engine")

    def _begin(self, generation: Generation, part: str, began: float) -> None:
        num_prompt_tokens = generation.begin(part, began)
        self._admission.begun(num_prompt_tokens)
        self._metrics.began(num_prompt_tokens)

    def _put(self, delta: Delta, now: float) -> None:
        generation = self._generations.get(delta.request_id)
        if generation is None:  # aborted, and the engine did not know yet
            return
        before = generation.num_tokens
        seconds = generation.put(delta, now)
        self._metrics.generated(generation.num_tokens - before)
        if seconds is None:
            self._metrics.got_first_token(generation.times)
        else:
            self._metrics.got_token(seconds)
        if generation.has_ended:  # what was counted is given back now, however long the client takes to read
            self.end(generation)
