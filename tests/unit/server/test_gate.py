"""What every request passes: keys, ids, and bodies that are too long, too slow, or too many; and the log."""

import asyncio
import hmac
import json
import logging

import pytest

from quantkit.server import gate as module
from quantkit.server.gate import Gate
from quantkit.server.logs import JsonFormatter
from quantkit.server.metrics import Metrics

PATHS = frozenset({"/health", "/v1/completions"})


async def echo(scope, receive, send):
    """Answers with the body."""
    message = await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": message["body"]})


def gate(app=echo, keys=()):
    return Gate(app, api_keys=keys, metrics=Metrics("m"), paths=PATHS)


async def request(
    app, *pieces, path="/v1/completions", headers=None, seconds=0.0, then="http.disconnect", method="POST"
):
    """Status, headers and body; pieces of the request's body come after so many seconds each."""
    sent = []
    queue = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces[:-1]]
    queue += [
        {"type": "http.request", "body": piece, "more_body": then != "http.disconnect"}
        for piece in pieces[-1:]
    ]

    async def receive():
        await asyncio.sleep(seconds)
        return queue.pop(0) if queue else {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    raw = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    scope = {"type": "http", "method": method, "path": path, "headers": raw, "client": ("1.2.3.4", 5)}
    scope |= {"raw_path": path.encode(), "query_string": b""}
    await app(scope, receive, send)
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], dict(sent[0]["headers"]), body


def test_a_body_in_pieces_arrives_whole():
    status, headers, body = asyncio.run(request(gate(), b"ab", b"", b"c"))
    assert (status, body) == (200, b"abc")
    assert len(headers[b"x-request-id"]) == 32


def test_head_is_answered_as_get_is():
    async def method(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": scope["method"].encode()})

    assert asyncio.run(request(gate(method), path="/health", method="HEAD"))[::2] == (200, b"GET")


def test_too_long_and_too_slow(monkeypatch):
    monkeypatch.setattr(module, "MAX_BODY_BYTES", 10)
    monkeypatch.setattr(module, "BODY_SECONDS", 0.05)
    assert asyncio.run(request(gate(), b"x" * 6, b"x" * 6))[0] == 413
    assert asyncio.run(request(gate(), b"", headers={"content-length": "11"}))[0] == 413
    assert asyncio.run(request(gate(), b"x", b"x", seconds=0.1))[0] == 408


def test_long_headers_are_refused(monkeypatch):
    monkeypatch.setattr(module, "MAX_HEADER_BYTES", 11)
    assert asyncio.run(request(gate(), b"", path="/", headers={"name": "123456"}))[0] == 200
    assert asyncio.run(request(gate(), b"", path="/", headers={"name": "1234567"}))[0] == 431
    assert asyncio.run(request(gate(), b"", path="/", headers={"name": "1234", "more": "5"}))[0] == 431
    assert asyncio.run(request(gate(), b"", path="/123456", headers={"name": "1"}))[0] == 431


def test_a_long_url_is_cut_in_the_log(caplog):
    caplog.set_level(logging.INFO, logger="quantkit.server")
    asyncio.run(request(gate(), b"", path="/" + "x" * 5000))
    assert len(caplog.records[-1].fields["path"]) == 200


def test_who_leaves_before_the_body_is_there_reaches_nobody():
    async def unreachable(scope, receive, send):
        raise AssertionError("not for applications")

    assert asyncio.run(request(gate(unreachable), b"x", then="nothing"))[0] == 499


def test_all_bodies_together_are_bounded_and_given_back(monkeypatch):
    monkeypatch.setattr(module, "MAX_BODIES_BYTES", 10)
    release = asyncio.Event()

    async def slow(scope, receive, send):
        await release.wait()
        await echo(scope, receive, send)

    async def story():
        app = gate(slow)
        first = asyncio.create_task(request(app, b"x" * 8))
        await asyncio.sleep(0.01)
        refused = await request(app, b"x" * 8)
        release.set()
        return await first, refused, await request(app, b"x" * 8)

    first, refused, later = asyncio.run(story())
    assert [first[0], refused[0], later[0]] == [200, 429, 200]
    assert json.loads(refused[2])["error"]["code"] == "rate_limit_exceeded"


def test_every_key_is_compared_in_constant_time(monkeypatch):
    compared, original = [], hmac.compare_digest

    def compare(one, other):
        compared.append(len(one) == len(other))
        return original(one, other)

    monkeypatch.setattr(module.hmac, "compare_digest", compare)
    app = gate(keys=("short", "a much longer key"))
    for key, status in (("short", 200), ("a much longer key", 200), ("shor", 401), ("", 401), ("kéy", 401)):
        headers = {"authorization": f"Bearer {key}"}
        assert asyncio.run(request(app, b"", headers=headers))[0] == status
    assert compared == [True] * 10
    assert asyncio.run(request(app, b"", path="/health"))[0] == 200


@pytest.mark.parametrize(
    ("given", "is_kept"), [("a-1.b_c", True), ("a b", False), ("x" * 129, False), ("é", False)]
)
def test_a_sane_request_id_is_kept(given, is_kept):
    _, headers, _ = asyncio.run(request(gate(), b"", headers={"x-request-id": given}))
    assert (headers[b"x-request-id"] == given.encode()) == is_kept


def test_log_lines_are_ascii_without_control_characters():
    record = logging.LogRecord("x", logging.INFO, "", 0, "say %s", ("\x1b[31m\n\u2028é",), None)
    record.fields = {"user": "\x07\r"}
    line = JsonFormatter().format(record)
    assert line.isascii()
    assert line.isprintable()
    assert json.loads(line)["user"] == "\x07\r"
