"""What every request passes before any endpoint sees it: its id, its key, its body's size; and its log line.

The body is read here, whole, so that nothing behind has to think of clients that send slowly or without end.
"""

import asyncio
import hashlib
import hmac
import re
import time
import uuid
from collections.abc import AsyncIterator, Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quantkit.server.answers import JsonResponse
from quantkit.server.errors import MAX_SHOWN_CHARS, ApiError, client_gone, overloaded
from quantkit.server.generation import Generation
from quantkit.server.limits import (
    BODY_SECONDS,
    MAX_BODIES_BYTES,
    MAX_BODY_BYTES,
    MAX_HEADER_BYTES,
    MAX_REQUEST_ID_CHARS,
)
from quantkit.server.logs import logger
from quantkit.server.metrics import Metrics

OPEN_PATHS = frozenset({"/", "/health"})  # no key is asked for
QUIET_PATHS = frozenset({"/health", "/metrics", "/facts"})  # probes: their lines would hide the others
REQUEST_ID = re.compile(rf"[A-Za-z0-9._-]{{1,{MAX_REQUEST_ID_CHARS}}}")
METHODS_WITH_BODY = frozenset({"POST", "PUT", "PATCH", "DELETE"})


class Gate:
    """ASGI middleware. paths: the server's own, which metrics are counted by."""

    def __init__(
        self, app: ASGIApp, *, api_keys: Iterable[str], metrics: Metrics, paths: frozenset[str]
    ) -> None:
        self._app = app
        self._keys = [_digest(key.encode()) for key in api_keys]
        self._metrics = metrics
        self._paths = paths
        self._num_bytes = 0  # of all bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope)
        try:
            await self._pass(scope, receive, exchange.sending(send))
        finally:
            self._end(exchange)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = _Body(receive)
        try:
            try:
                _check_headers(scope)
                self._check_key(scope)
                if scope["method"] in METHODS_WITH_BODY:
                    await self._read(scope, body)
            except ApiError as error:
                headers = {**error.headers, "Connection": "close"}  # what is left of the body is not read
                await JsonResponse(error.body(), error.status, headers)(scope, receive, send)
                return
            if scope["method"] == "HEAD":
                scope = {**scope, "method": "GET"}  # uvicorn, whose scope stays as it is, leaves the body out
            await self._app(scope, body.receive, send)
        finally:
            self._num_bytes -= body.num_bytes

    def _check_key(self, scope: Scope) -> None:
        """Raises ApiError unless the path is open, or one of the keys is given; each is compared, in constant time."""
        if not self._keys or scope["path"] in OPEN_PATHS:
            return
        scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        given = _digest(key.strip())
        matches = [hmac.compare_digest(given, expected) for expected in self._keys]
        if not any(matches) or scheme.lower() != b"bearer":
            raise ApiError(
                401,
                "Incorrect API key provided." if key else "You didn't provide an API key.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _read(self, scope: Scope, body: "_Body") -> None:
        """All of the body. Raises ApiError if it is too long, or comes too slowly, or others fill the memory."""
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > MAX_BODY_BYTES:
            raise _too_long()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for num_bytes in body.pieces():
                    self._num_bytes += num_bytes
                    if body.num_bytes > MAX_BODY_BYTES:
                        raise _too_long()
                    if self._num_bytes > MAX_BODIES_BYTES:
                        raise overloaded("the bodies of all requests are too much together", retry_after=1)
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:g} s") from None

    def _end(self, exchange: "_Exchange") -> None:
        scope = exchange.scope
        path = scope["path"] if scope["path"] in self._paths else "other"
        self._metrics.responded(path, exchange.status)
        generation = scope["state"].get("generation")
        if generation is not None:
            self._metrics.ended(generation, time.monotonic())
        if scope["path"] not in QUIET_PATHS:
            logger.info("request", extra={"fields": exchange.fields(generation)})


class _Body:
    """A body as it arrives, and then, whole, as an application receives it."""

    def __init__(self, receive: Receive) -> None:
        self.num_bytes = 0
        self._receive = receive
        self._pieces: list[bytes] = []
        self._is_taken = False

    async def pieces(self) -> AsyncIterator[int]:
        """The size of each piece."""
        more = True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise client_gone()
            piece = message.get("body", b"")
            self.num_bytes += len(piece)
            self._pieces.append(piece)
            yield len(piece)
            more = message.get("more_body", False)

    async def receive(self) -> Message:
        """The body once, then what follows: the client's end."""
        if self._is_taken:
            return await self._receive()
        self._is_taken = True
        body = b"".join(self._pieces)
        self._pieces.clear()
        return {"type": "http.request", "body": body, "more_body": False}


class _Exchange:
    """One request and what it was answered."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.status = 0  # nothing was sent
        self._arrival = time.monotonic()
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        self.request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {}).update(request_id=self.request_id, arrival=self._arrival)

    def sending(self, send: Send) -> Send:
        """Send, with the request's id in the headers."""

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.status = message["status"]
                headers = [*message.get("headers", []), (b"x-request-id", self.request_id.encode())]
                message = {**message, "headers": headers}
            await send(message)

        return sent

    def fields(self, generation: Generation | None) -> dict[str, object]:
        """For the log: no prompt, no answer, no key."""
        client = self.scope["client"]
        fields: dict[str, object] = {
            "request_id": self.request_id,
            "client": client[0] if client else None,
            "method": self.scope["method"][:MAX_SHOWN_CHARS],
            "path": self.scope["path"][:MAX_SHOWN_CHARS],
            "status": self.status,
            "seconds": round(time.monotonic() - self._arrival, 4),
        }
        if user := self.scope["state"].get("user"):
            fields["user"] = user
        if generation is not None:
            fields |= _generation_fields(generation)
        return fields


def _generation_fields(generation: Generation) -> dict[str, object]:
    arrival, _, first, _ = generation.times
    return {
        "prompt_tokens": generation.num_prompt_tokens,
        "cached_tokens": generation.num_cached_tokens,
        "completion_tokens": generation.num_tokens,
        "ttft_seconds": None if first is None else round(first - arrival, 4),
        "finish": generation.error.code if generation.error else generation.finish_reasons,
    }


def _check_headers(scope: Scope) -> None:
    """Raises ApiError if they, or the URL, are too long: uvicorn bounds only what has not arrived whole."""
    num_bytes = len(scope["raw_path"]) + len(scope["query_string"])
    num_bytes += sum(len(name) + len(value) for name, value in scope["headers"])
    if num_bytes > MAX_HEADER_BYTES:
        raise ApiError(
            431, f"the URL and headers are longer than {MAX_HEADER_BYTES} bytes", code="headers_too_large"
        )


def _digest(key: bytes) -> bytes:
    """Of a fixed length, so that comparing tells nothing of the key's."""
    return hashlib.sha256(key).digest()


def _too_long() -> ApiError:
    return ApiError(413, f"the body is longer than {MAX_BODY_BYTES} bytes", code="request_too_large")
