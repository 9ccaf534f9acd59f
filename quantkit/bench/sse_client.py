"""One streamed request to an OpenAI-compatible server, its events timed as their bytes arrive.

    connected ── sent ───── event ── event ── … ── [DONE]
                  |─ the clock

A load generator has to take more events than the server can send. So this is h11 on a bare asyncio protocol: of what
one event costs, most is the system's call that reads it. Proxies and redirects are not followed.
"""

import asyncio
import json
import ssl
import time
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import h11

from quantkit.bench.arrivals import Arrivals
from quantkit.bench.sse_events import Events, Problem, error_message
from quantkit.errors import BenchError

OK = 200


class Server(NamedTuple):
    """Where requests go. address: host and port as the URL has them. path: before `/v1`. headers: of each request."""

    address: str
    host: str
    port: int
    path: str
    tls: ssl.SSLContext | None
    headers: tuple[tuple[str, str], ...]


class Answer(NamedTuple):
    """seconds: from sending the request until its end. problem: None if there is an answer, which has arrivals then.

    is_counted: whether the server said how many tokens there are; else each event counts as one.
    """

    seconds: float
    arrivals: Arrivals | None
    is_counted: bool
    problem: Problem | None


def parse_server(url: str, api_key: str | None) -> Server:
    """A server by its URL, with `/v1` or without. Raises BenchError if it is none."""
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = 0
    is_plain = url.isascii() and url.isprintable() and " " not in url and not parts.query
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or not is_plain:
        raise BenchError(f"--url {url}: not the URL of a server", fix="give one like http://127.0.0.1:8000")
    if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
        raise BenchError("the API key has characters that no header can hold", fix="give it as it was made")
    return Server(
        address=parts.netloc.rpartition("@")[2],
        host=parts.hostname,
        port=port or (443 if parts.scheme == "https" else 80),
        path=parts.path.rstrip("/").removesuffix("/v1"),
        tls=ssl.create_default_context() if parts.scheme == "https" else None,
        headers=() if api_key is None else (("Authorization", f"Bearer {api_key}"),),
    )


async def stream(server: Server, path: str, body: bytes, timeout: float) -> Answer:
    """Send one request, with a body of JSON, on a connection of its own; what goes wrong with it is in the answer."""
    events = Events()
    exchange = _Exchange(server, "POST", path, body, events.add)
    problem = await exchange.run(timeout) or _problem_of(exchange) or events.problem()
    arrivals = None if problem else events.arrivals()
    return Answer(exchange.seconds, arrivals, bool(events.usage), problem)


async def get_json(server: Server, path: str, timeout: float) -> Any:
    """What the server has there. Raises BenchError if it answers with an error, with no JSON, or not at all."""
    exchange = _Exchange(server, "GET", path)
    problem = await exchange.run(timeout) or _problem_of(exchange)
    if problem is not None:
        raise BenchError(
            f"{server.address}{server.path}{path}: {problem.kind}: {problem.message}",
            fix="check --url and the API key, and that the server is ready",
        )
    try:
        return json.loads(exchange.body)
    except ValueError:
        raise BenchError(
            f"{path}: the answer is no JSON", fix="check that --url is an OpenAI server"
        ) from None


class _Exchange(asyncio.Protocol):
    """One request and its answer. on_body: takes the body of a 200 as it comes, and the seconds; else it is kept."""

    def __init__(
        self,
        server: Server,
        method: str,
        path: str,
        sent: bytes = b"",
        on_body: Callable[[bytes, float], None] | None = None,
    ) -> None:
        self.status = 0
        self.body = b""
        self.seconds = 0.0
        self._server = server
        self._http = h11.Connection(h11.CLIENT)
        self._request = self._bytes_of(method, path, sent)
        self._on_body = on_body
        self._started = time.perf_counter()  # again once connected
        self._ended: asyncio.Future[Problem | None] = asyncio.get_running_loop().create_future()

    async def run(self, timeout: float) -> Problem | None:
        """Until the end of the answer, whatever its status; a problem if it does not get there."""
        server = self._server
        loop = asyncio.get_running_loop()
        transport: asyncio.Transport | None = None
        try:
            async with asyncio.timeout(timeout):
                transport, _ = await loop.create_connection(
                    lambda: self, server.host, server.port, ssl=server.tls
                )
                self._started = time.perf_counter()
                transport.write(self._request)
                return await self._ended
        except TimeoutError:
            return Problem("timeout", f"no end after {timeout:g} s")
        except (OSError, UnicodeError) as error:  # a name that cannot be one of a host
            return Problem("no connection", str(error))
        finally:
            self.seconds = self.seconds or self._now()
            if transport is not None:
                transport.close()

    def data_received(self, data: bytes) -> None:
        """Bytes of the answer, all of which came at this moment."""
        self._take(data, self._now())

    def connection_lost(self, exc: Exception | None) -> None:
        """The end of a body that is as long as its connection; elsewhere it comes too early."""
        self._take(b"", self._now())
        self._end(Problem("cut off", str(exc or "the server closed the connection before the end")))

    def _take(self, data: bytes, now: float) -> None:
        if self._ended.done():
            return
        try:
            self._http.receive_data(data)
            while not self._ended.done() and (event := self._http.next_event()) is not h11.NEED_DATA:
                self._take_event(event, now)
        except h11.RemoteProtocolError as error:
            self._end(Problem("cut off" if not data else "not HTTP", str(error)))

    def _take_event(self, event: object, now: float) -> None:
        if isinstance(event, h11.Response):
            self.status = event.status_code
        elif isinstance(event, h11.Data):
            if self._on_body is not None and self.status == OK:
                self._on_body(bytes(event.data), now)
            else:
                self.body += event.data
        elif isinstance(event, h11.EndOfMessage):
            self._end(None)

    def _end(self, problem: Problem | None) -> None:
        if not self._ended.done():
            self.seconds = self._now()
            self._ended.set_result(problem)

    def _now(self) -> float:
        return time.perf_counter() - self._started

    def _bytes_of(self, method: str, path: str, sent: bytes) -> bytes:
        server = self._server
        headers = [
            ("Host", server.address),
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(sent))),
            *server.headers,
        ]
        request = h11.Request(method=method, target=server.path + path, headers=headers)
        parts = (request, h11.Data(data=sent), h11.EndOfMessage())
        return b"".join(self._http.send(part) or b"" for part in parts)


def _problem_of(exchange: _Exchange) -> Problem | None:
    """What an answer other than 200 says."""
    if exchange.status == OK:
        return None
    try:
        message = error_message(json.loads(exchange.body))
    except (ValueError, TypeError, KeyError):
        message = exchange.body[:200].decode(errors="replace")
    return Problem(f"HTTP {exchange.status}", message)
