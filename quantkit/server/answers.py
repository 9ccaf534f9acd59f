"""A generation as an HTTP response, to a client that may be slow, or gone: as one JSON object, or as events.

Whatever ends it, the engine is told. Headers leave with the first token: what fails before it has a status of its own.
"""

import asyncio
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from quantkit.server.engine_client import EngineClient
from quantkit.server.errors import CLIENT_GONE, ApiError, client_gone, timed_out
from quantkit.server.generation import Generation
from quantkit.server.messages import Choice

EVENT_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # proxies that would collect events
]
DONE = b"data: [DONE]\n\n"
# ASCII; json.dumps makes an encoder each time
encode = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode


class JsonResponse(Response):
    """An object as ASCII: whatever a text holds, it can be encoded."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return encode(content).encode()


class Answer(Response, ABC):
    """Runs a generation to its end. timeout: seconds from the request's arrival."""

    def __init__(self, generation: Generation, engine: EngineClient, *, timeout: float) -> None:
        super().__init__()
        self._generation = generation
        self._engine = engine
        self._timeout = timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        generation = self._generation
        gone = asyncio.create_task(_fail_when_gone(generation, receive))
        deadline = generation.times.arrival + self._timeout
        timer = asyncio.get_running_loop().call_at(deadline, generation.fail, timed_out(self._timeout))
        try:
            await self._write(scope, receive, send)
        finally:
            gone.cancel()
            timer.cancel()
            self._engine.end(generation)

    @abstractmethod
    async def _write(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send what comes of the generation, until its end."""


class WholeAnswer(Answer):
    """make: all choices as the object to be sent."""

    def __init__(
        self,
        generation: Generation,
        engine: EngineClient,
        *,
        timeout: float,
        make: Callable[[list[Choice]], Any],
    ) -> None:
        super().__init__(generation, engine, timeout=timeout)
        self._make = make

    async def _write(self, scope: Scope, receive: Receive, send: Send) -> None:
        async for choices in self._generation.pieces():
            await JsonResponse(self._make(choices))(scope, receive, send)


class StreamedAnswer(Answer):
    """make: the objects for what is new; last: those after everything."""

    def __init__(
        self,
        generation: Generation,
        engine: EngineClient,
        *,
        timeout: float,
        make: Callable[[list[Choice]], list[Any]],
        last: Callable[[], list[Any]],
    ) -> None:
        super().__init__(generation, engine, timeout=timeout)
        self._make = make
        self._last = last

    async def _write(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_started = False
        try:
            async for choices in self._generation.pieces():
                if not has_started:
                    await send({"type": "http.response.start", "status": 200, "headers": EVENT_HEADERS})
                    has_started = True
                await _send(send, _events(self._make(choices)), more=True)
            await _send(send, _events(self._last()) + DONE, more=False)
        except ApiError as error:
            if not has_started:
                raise
            if error.status != CLIENT_GONE:
                await _send(send, _events([error.body()]), more=False)


def _events(objects: list[Any]) -> bytes:
    return "".join([f"data: {encode(each)}\n\n" for each in objects]).encode()


async def _send(send: Send, body: bytes, *, more: bool) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})


async def _fail_when_gone(generation: Generation, receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    generation.fail(client_gone())
