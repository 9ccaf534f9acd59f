"""A server that speaks OpenAI's streams and answers nothing but what a test scripts, in a thread of this process."""

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

MODEL = "stand-in"
Answer = Callable[[dict[str, Any]], Awaitable[Response]]


def chunk(text: str | None, *, is_chat: bool, finish: str | None = None) -> dict[str, Any]:
    """An event of a stream that brings some text."""
    content: dict[str, Any] = (
        {"delta": {"content": text} if text else {}} if is_chat else {"text": text or ""}
    )
    return {"model": MODEL, "choices": [{"index": 0, **content, "finish_reason": finish}]}


def usage(num_prompt: int, num_output: int) -> dict[str, Any]:
    """The last event of a stream, where the client asked for it."""
    numbers = {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
    }
    return {"model": MODEL, "choices": [], "usage": numbers}


def sse(events: AsyncIterator[object]) -> StreamingResponse:
    """A stream of events; text stays as it is, all else becomes JSON."""

    async def lines() -> AsyncIterator[str]:
        async for event in events:
            yield f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream")


def error(status: int, message: str, **headers: str) -> JSONResponse:
    """OpenAI's error object."""
    fields = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": fields}, status, headers)


class StandIn:
    """What tests see of it. bodies: of all requests, as they came. most: requests that were under way at once."""

    def __init__(self, answer: Answer) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.most = 0
        self.under_way = 0
        self.app = FastAPI()
        self._answer = answer
        self.app.post("/v1/completions")(self._generate)
        self.app.post("/v1/chat/completions")(self._generate)
        self.app.get("/v1/models")(self._models)

    async def _models(self) -> dict[str, Any]:
        return {"object": "list", "data": [{"id": MODEL, "object": "model"}]}

    async def _generate(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        response = await self._answer(body)
        if isinstance(response, StreamingResponse):
            response.body_iterator = self._counted(response.body_iterator)
        else:
            self.under_way -= 1
        return response

    async def _counted(self, events: AsyncIterator[Any]) -> AsyncIterator[Any]:
        try:
            async for event in events:
                yield event
        finally:
            self.under_way -= 1


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """The app at a free port of this machine; its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", ws="none"))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            server.force_exit = True
            thread.join()
