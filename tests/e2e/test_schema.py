"""The OpenAPI schema and the server are of one mind; and whatever is sent, nothing breaks."""

import http.client
import json
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

from tests.malformed import malformed
from tests.serving import held, is_idle, serving, wait_until
from tests.tiny_chat import save_tiny_chat

load_all_checks()
NUM_CLIENTS = 8
MOST_NEW_BYTES = 32 << 20  # of a process, from the first fifth to the end
HI = [{"role": "user", "content": "Hi"}]
# a schema cannot say that a prompt fits the model, or that of two fields one is given
BEYOND_A_SCHEMA = [CHECKS.get_one("positive_data_acceptance")]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = save_tiny_chat(tmp_path_factory.mktemp("tiny") / "model", max_positions=512)
    options = ("--max-num-seqs", "8", "--max-waiting", "32", "--tool-call-parser", "hermes")
    with serving(folder, "--served-model-name", "tiny", *options) as running:
        yield running


@pytest.fixture(scope="module")
def api(server):
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


CITY = {"type": "object", "properties": {"city": {"enum": ["Rome"]}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
CHAT = {"model": "tiny", "messages": HI, "max_tokens": 4}
COMPLETION = {"model": "tiny", "prompt": "Hi", "max_tokens": 4}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT),
        ("/v1/chat/completions", {**CHAT, "n": 2, "logprobs": True, "top_logprobs": 2}),
        ("/v1/chat/completions", {**CHAT, "max_tokens": 200, "response_format": {"type": "json_object"}}),
        ("/v1/chat/completions", {**CHAT, "max_tokens": 200, "tools": [TOOL], "tool_choice": "required"}),
        ("/v1/chat/completions", {**CHAT, "stream": True, "stream_options": {"include_usage": True}}),
        ("/v1/completions", COMPLETION),
        ("/v1/completions", {**COMPLETION, "prompt": [[9], [8, 7]], "n": 2, "logprobs": 3}),
        ("/v1/completions", {**COMPLETION, "stream": True}),
        ("/tokenize", {"prompt": "Hi"}),
        ("/tokenize", {"messages": HI}),
        ("/detokenize", {"tokens": [72, 73]}),
    ],
)
def test_what_is_answered_is_what_the_schema_declares(api, path, body):
    case = api[path]["POST"].Case(body=body, media_type="application/json")
    assert case.call_and_validate().status_code == 200


@pytest.mark.parametrize("mode", GenerationMode)
@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_what_the_schema_allows_and_what_it_does_not(api, mode, data):
    """Each is answered with a status, a type and a body that the schema declares, none with a 5xx."""
    operation = data.draw(st.sampled_from([found.ok() for found in api.get_all_operations()]))
    case = data.draw(operation.as_strategy(generation_mode=mode))
    case.call_and_validate(excluded_checks=BEYOND_A_SCHEMA)


@pytest.mark.parametrize("num_bodies", [2_000, pytest.param(10_000, marks=pytest.mark.long)])
def test_malformed_bodies_break_nothing(server, num_bodies):
    question = {"model": "tiny", "prompt": "Hi", "max_tokens": 30, "temperature": 0, "ignore_eos": True}
    pids = (server.process.pid, server.wait_until_ready())
    with httpx2.Client(base_url=server.url, timeout=60) as client:
        before = client.post("/v1/completions", json=question).json()["choices"]
        statuses = send_malformed(server.port, 0, num_bodies // 5)
        wait_until(lambda: is_idle(client))
        held_then = [held(pid) for pid in pids]
        statuses += send_malformed(server.port, 1, num_bodies * 4 // 5)
        wait_until(lambda: is_idle(client))
        assert client.post("/v1/completions", json=question).json()["choices"] == before
    assert statuses.total() == num_bodies
    assert statuses[400] > num_bodies // 2 and statuses[200] > 0
    assert all(status == 200 or 400 <= status < 500 for status in statuses), statuses
    for now, then in zip([held(pid) for pid in pids], held_then, strict=True):
        assert now.num_bytes - then.num_bytes < MOST_NEW_BYTES
        assert now.num_files <= then.num_files + 1  # the client's connection


def send_malformed(port, seed, count):
    """Statuses, of so many from several clients at once."""

    def send(number):
        numbers = random.Random(f"{seed} {number}")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        statuses = Counter()
        for _ in range(count // NUM_CLIENTS):
            path, content_type, body = malformed(numbers)
            connection.request("POST", path, body, {"Content-Type": content_type})
            response = connection.getresponse()
            answer = response.read()
            assert response.status == 200 or json.loads(answer)["error"]["message"], (path, body, answer)
            statuses[response.status] += 1
        connection.close()
        return statuses

    with ThreadPoolExecutor(NUM_CLIENTS) as clients:
        return sum(clients.map(send, range(NUM_CLIENTS)), Counter())
