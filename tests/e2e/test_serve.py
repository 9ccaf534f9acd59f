"""The server as its clients see it: a real process, the real `openai` client, and what no client would send."""

import json
import math
import os
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx2
import openai
import pytest

from quantkit import LLM, SamplingParams
from quantkit.cli.main import run
from quantkit.server.limits import MAX_BODY_BYTES, MAX_HEADER_BYTES
from tests.command_line import QUANTKIT, finish
from tests.serving import Server, is_idle, metric, serving, wait_until
from tests.tiny_chat import save_tiny_chat

KEY = "sk-first"
HI = [{"role": "user", "content": "Hi"}]
LONG = {"max_tokens": 3000, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_chat(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def server(model):
    options = (
        "--api-key",
        KEY,
        "--api-key",
        "sk-second",
        "--served-model-name",
        "tiny",
        "--max-num-seqs",
        "4",
    )
    with serving(model, *options, "--max-waiting", "4", "--max-waiting-tokens", "4000") as running:
        yield running


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as made:
        yield made


@pytest.fixture
def http(server):
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx2.Client(base_url=server.url, headers=headers, timeout=120) as made:
        yield made


@pytest.fixture(scope="module")
def llm(model):
    return LLM(model, device="cpu", max_num_seqs=4)


def complete(http, **body):
    return http.post("/v1/completions", json={"model": "tiny", "prompt": "Hi", **body})


# answers


def test_the_log_says_whether_a_key_is_asked_for(server):
    assert server.line("listening")["asks_for_key"] is True


def test_a_conversation_is_what_the_engine_says(client, llm):
    params = SamplingParams(max_tokens=24, temperature=0.8, seed=7, top_p=0.9, presence_penalty=0.5)
    expected = llm.chat(HI, params)[0].outputs[0]
    settings = {"max_tokens": 24, "temperature": 0.8, "seed": 7, "top_p": 0.9, "presence_penalty": 0.5}
    answer = client.chat.completions.create(model="tiny", messages=HI, **settings)
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].finish_reason == expected.finish_reason
    assert answer.usage.prompt_tokens == len(llm.tokenizer.encode_chat(HI))
    assert answer.usage.completion_tokens == len(expected.token_ids)


@pytest.mark.parametrize("num_answers", [1, 3])
def test_a_stream_joins_to_the_answer(client, num_answers):
    settings = {
        "model": "tiny",
        "messages": HI,
        "max_tokens": 30,
        "temperature": 1,
        "seed": 3,
        "n": num_answers,
    }
    settings |= {"logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**settings)
    chunks = list(
        client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1
    for choice in whole.choices:
        pieces = [each for chunk in chunks for each in chunk.choices if each.index == choice.index]
        assert pieces[0].delta.role == "assistant"
        assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
        assert pieces[-1].finish_reason == choice.finish_reason
        assert "".join(piece.delta.content or "" for piece in pieces) == choice.message.content
        logprobs = [token for piece in pieces if piece.logprobs for token in piece.logprobs.content]
        assert [token.token for token in logprobs] == [token.token for token in choice.logprobs.content]
        assert all(len(token.top_logprobs) == 2 for token in logprobs)


def test_completions_of_many_prompts(client, llm):
    prompts = ["Hi", "What is", "x"]
    params = SamplingParams(max_tokens=9, n=2, temperature=1, seed=5)
    expected = [answer.text for output in llm.generate(prompts, params) for answer in output.outputs]
    settings = {"model": "tiny", "max_tokens": 9, "n": 2, "temperature": 1, "seed": 5}
    whole = client.completions.create(prompt=prompts, **settings)
    assert [choice.text for choice in whole.choices] == expected
    assert [choice.index for choice in whole.choices] == list(range(6))
    texts = [""] * 6
    for chunk in client.completions.create(prompt=prompts, stream=True, **settings):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == expected
    ids = [llm.tokenizer.encode_prompt(prompt, raw=True) for prompt in prompts]
    assert [choice.text for choice in client.completions.create(prompt=ids, **settings).choices] == expected


def test_logprobs_of_completions_are_probabilities(http):
    answer = complete(http, max_tokens=6, temperature=0, logprobs=20, ignore_eos=True).json()
    logprobs = answer["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"]) == 6
    for chosen, likeliest in zip(logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
        assert chosen == max(likeliest.values())  # greedy
        assert sum(map(math.exp, likeliest.values())) <= 1.001
    assert logprobs["text_offset"][0] == 0


def test_stop_strings_bias_and_minimum(client, llm):
    settings = {"model": "tiny", "prompt": "Hi", "max_tokens": 40, "temperature": 0}
    letters = {
        str(llm.tokenizer.encode_prompt(each, raw=True)[0]): 50 for each in "abcde"
    }  # which ones, is its own
    text = client.completions.create(**settings, logit_bias=letters).choices[0].text
    assert len(text) == 40
    stop = text[10:12]
    stopped = client.completions.create(**settings, logit_bias=letters, stop=stop).choices[0]
    assert stopped.text == text[: text.index(stop)]
    assert stopped.finish_reason == "stop"
    (letter,) = llm.tokenizer.encode_prompt("b", raw=True)
    biased = client.completions.create(**{**settings, "max_tokens": 5}, logit_bias={str(letter): 100})
    assert biased.choices[0].text == "bbbbb"
    ended = client.completions.create(**settings, logit_bias={"1": 100}, extra_body={"min_tokens": 3})
    assert ended.usage.completion_tokens == 4
    assert ended.choices[0].finish_reason == "stop"


def test_what_is_cached_is_counted(client):
    settings = {
        "model": "tiny",
        "prompt": "A prompt of more than a block, asked twice. " * 3,
        "max_tokens": 2,
    }
    client.completions.create(**settings)
    usage = client.completions.create(**settings).usage
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens // 16 * 16


def test_models_and_tokens(client, http, llm):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    tokenized = http.post("/tokenize", json={"prompt": "Grüße"}).json()
    assert tokenized["tokens"] == llm.tokenizer.encode_prompt("Grüße", raw=True)
    assert tokenized["count"] == len(tokenized["tokens"])
    assert http.post("/tokenize", json={"messages": HI}).json()["tokens"] == llm.tokenizer.encode_chat(HI)
    assert http.post("/detokenize", json={"tokens": tokenized["tokens"]}).json() == {"prompt": "Grüße"}


# errors


@pytest.mark.parametrize(
    ("change", "status", "param", "code"),
    [
        ({"model": "other"}, 404, "model", "model_not_found"),
        ({"frobnicate": 1}, 400, "frobnicate", "unknown_parameter"),
        ({"best_of": 2}, 400, "best_of", "unknown_parameter"),
        ({"n": 17}, 400, "n", "invalid_value"),
        ({"max_tokens": 0}, 400, "max_tokens", "invalid_value"),
        ({"temperature": -1}, 400, "temperature", "invalid_value"),
        ({"logprobs": 21}, 400, "logprobs", "invalid_value"),
        ({"logit_bias": {"x": 1}}, 400, "logit_bias", "invalid_value"),
        ({"logit_bias": {"260": 1}}, 400, "logit_bias", "invalid_value"),
        ({"stop": ["x"] * 17}, 400, "stop", "invalid_value"),
        ({"stop": "x" * 300}, 400, "stop", "invalid_value"),
        ({"stream_options": {}}, 400, "stream_options", "invalid_value"),
        ({"prompt": []}, 400, "prompt", "invalid_value"),
        ({"prompt": ["x"] * 129}, 400, "prompt", "invalid_value"),
        ({"prompt": [260]}, 400, "prompt", "invalid_value"),
        ({"prompt": "x" * 5000}, 400, "prompt", "context_length_exceeded"),
        ({"max_tokens": 4095}, 400, "prompt", "context_length_exceeded"),
    ],
)
def test_what_cannot_be_answered_says_why(http, change, status, param, code):
    response = complete(http, **change)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (status, param, code)
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[",
        b"null",
        b"[]",
        b'"x"',
        b"[" * 100_000,
        b'{"model":"tiny","prompt":"\\ud800"}',
        b"\xff\xfe",
        b"{" * 9,
    ],
)
def test_bodies_that_are_none(http, body):
    response = http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_the_client_knows_the_errors(client):
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=HI)
    with pytest.raises(openai.BadRequestError, match="top_logprobs"):
        client.chat.completions.create(model="tiny", messages=HI, top_logprobs=2)
    with pytest.raises(openai.NotFoundError, match="Unknown request URL"):
        client.embeddings.create(model="tiny", input="x")


def test_a_key_is_needed_but_for_health(server):
    def status(path, key=None, scheme="Bearer"):
        headers = {} if key is None else {"Authorization": f"{scheme} {key}"}
        return httpx2.get(server.url + path, headers=headers).status_code

    assert status("/health") == status("/") == 200
    for path in ("/v1/models", "/metrics", "/facts", "/openapi.json", "/nowhere"):
        assert status(path) == status(path, "sk-wrong") == status(path, KEY, "Basic") == 401
    assert status("/v1/models", KEY) == status("/v1/models", "sk-second") == 200


def test_requests_have_ids_and_lines_without_what_they_say(server, http):
    secret = "\x1b[31mSECRET"
    response = http.post(
        "/v1/completions",
        json={"model": "tiny", "prompt": secret, "max_tokens": 3, "ignore_eos": True, "user": "u\x1b[0m"},
        headers={"X-Request-Id": "mine-1"},
    )
    assert response.headers["x-request-id"] == "mine-1"
    line = server.line("request", request_id="mine-1")
    assert (line["status"], line["completion_tokens"], line["user"]) == (200, 3, "u\x1b[0m")
    assert not any("SECRET" in json.dumps(each) for each in server.logged)
    replaced = http.get("/v1/models", headers={"X-Request-Id": "no spaces"}).headers["x-request-id"]
    assert replaced != "no spaces"


# bounds


def test_bodies_and_headers_are_bounded(server, http):
    assert complete(http, prompt="x" * MAX_BODY_BYTES).status_code == 413
    pieces = (b"x" * 65536 for _ in range(MAX_BODY_BYTES // 65536 + 1))  # no Content-Length
    with suppress(httpx2.WriteError):  # the server closes the connection, and does not read the rest
        assert http.post("/v1/completions", content=pieces).status_code == 413
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\nX: " + b"x" * 2 * MAX_HEADER_BYTES)
        assert raw.recv(100).startswith(b"HTTP/1.1 4")
    assert http.get("/health").status_code == 200


def test_what_waits_is_bounded(http):
    with ThreadPoolExecutor(12) as threads:
        sent = [threads.submit(complete, http, max_tokens=300, ignore_eos=True) for _ in range(12)]
        responses = [each.result() for each in sent]
    statuses = [response.status_code for response in responses]
    assert statuses.count(200) == 8  # four run, four wait
    refused = [response for response in responses if response.status_code == 429]
    assert len(refused) == 4
    assert all(int(response.headers["retry-after"]) >= 1 for response in refused)
    assert all(response.json()["error"]["code"] == "rate_limit_exceeded" for response in refused)
    wait_until(lambda: is_idle(http))


@pytest.mark.parametrize("is_streamed", [True, False])
def test_who_hangs_up_is_no_work(http, server, is_streamed):
    body = {"model": "tiny", "prompt": "Hi", "stream": is_streamed, **LONG}
    request_id = f"gone-{is_streamed}"
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nX-Request-Id: {request_id}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.sendall(head.encode() + data)
        wait_until(lambda: metric(http, "vllm:num_requests_running") == 1)
    line = server.line("request", request_id=request_id)
    assert line["finish"] == "client_gone"
    assert line["completion_tokens"] < LONG["max_tokens"]
    wait_until(lambda: is_idle(http))


def test_who_does_not_read_keeps_nobody_waiting(http, server):
    data = json.dumps({"model": "tiny", "prompt": "Hi", "stream": True, "logprobs": 20, **LONG}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nX-Request-Id: slow\r\n"
    )
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect(("127.0.0.1", server.port))
        raw.sendall(head.encode() + data)
        wait_until(lambda: metric(http, "vllm:num_requests_running") == 1)
        assert complete(http, max_tokens=5).status_code == 200
        wait_until(lambda: is_idle(http), seconds=200)  # cut off: the engine waits for nobody
    server.line("request", request_id="slow")


def test_metrics_count(http):
    before = {
        name: metric(http, f"vllm:{name}") for name in ("generation_tokens_total", "request_success_total")
    }
    complete(http, max_tokens=7, ignore_eos=True, n=2)
    assert metric(http, "vllm:generation_tokens_total") == before["generation_tokens_total"] + 14
    assert metric(http, "vllm:request_success_total") == before["request_success_total"] + 2
    names = (
        "time_to_first_token_seconds_count",
        "e2e_request_latency_seconds_count",
        "prefix_cache_queries_total",
    )
    assert all(metric(http, f"vllm:{name}") > 0 for name in names)
    assert 'model_name="tiny"' in http.get("/metrics").text


# beginnings and ends


def start_stream(server, **change):
    """A stream that has begun, and the thread that reads its events."""
    events = []

    def read():
        body = {"model": "tiny", "prompt": "Hi", "stream": True, **LONG, **change}
        with httpx2.stream("POST", f"{server.url}/v1/completions", json=body, timeout=120) as response:
            events.extend(line[6:] for line in response.iter_lines() if line.startswith("data: "))

    thread = threading.Thread(target=read)
    thread.start()
    wait_until(
        lambda: 'vllm:num_requests_running{model_name="tiny"} 1' in httpx2.get(f"{server.url}/metrics").text
    )
    return events, thread


def test_an_engine_that_hangs_is_told_of_and_its_death_ends_every_stream_and_the_server(model):
    def is_health(status):
        return lambda: httpx2.get(f"{server.url}/health").json() == {"status": status}

    with serving(model, "--served-model-name", "tiny", "--engine-timeout", "3") as server:
        pid = server.line("ready")["pid"]
        os.kill(pid, signal.SIGSTOP)
        wait_until(is_health("hung"), seconds=30)
        refused = httpx2.get(f"{server.url}/v1/models")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "hung")
        os.kill(pid, signal.SIGCONT)
        wait_until(is_health("ready"), seconds=30)
        events, thread = start_stream(server)
        os.kill(pid, signal.SIGKILL)
        wait_until(is_health("dead"), seconds=10)
        thread.join(10)
        assert json.loads(events[-1])["error"]["code"] == "engine_dead"
        assert server.exit_code() == 1


def test_told_to_stop_it_lets_running_requests_end(model):
    with serving(model, "--served-model-name", "tiny", "--drain-seconds", "200") as server:
        events, thread = start_stream(server, max_tokens=200)
        server.process.terminate()
        server.line("draining")
        health = httpx2.get(f"{server.url}/health")
        assert (health.status_code, health.json()) == (503, {"status": "draining"})
        refused = httpx2.post(f"{server.url}/v1/completions", json={"model": "tiny", "prompt": "Hi"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        thread.join(200)
        assert events[-1] == "[DONE]"
        assert server.exit_code() == 0
        assert server.line("stopped")["engine_exit_code"] == 0


@pytest.mark.parametrize("impatient", ["--drain-seconds 0.2", "a second signal"])
def test_what_does_not_end_in_time_ends_with_an_error(model, impatient):
    options = impatient.split() if impatient.startswith("--") else []
    with serving(model, "--served-model-name", "tiny", *options) as server:
        events, thread = start_stream(server)
        server.process.send_signal(signal.SIGINT)
        server.line("draining")
        if not options:
            server.process.send_signal(signal.SIGINT)
        thread.join(60)
        assert json.loads(events[-1])["error"]["code"] == "draining"
        assert server.exit_code() == 0


def test_requests_have_their_time(model):
    options = ("--served-model-name", "tiny", "--request-timeout", "0.3")
    with serving(model, *options) as server, httpx2.Client(base_url=server.url, timeout=60) as http:
        response = complete(http, **LONG)
        assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")
        wait_until(lambda: is_idle(http))


def test_it_says_that_it_loads_and_can_be_stopped_then(model):
    server = Server(model)
    try:
        health = httpx2.get(f"{server.url}/health")
        assert (health.status_code, health.json()) == (503, {"status": "loading"})
        refused = httpx2.get(f"{server.url}/v1/models")
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        server.process.terminate()
        assert server.exit_code() == 0
    finally:
        server.kill()


def test_a_base_model_has_no_conversations(tmp_path):
    with serving(save_tiny_chat(tmp_path / "base", template=None)) as server:
        response = httpx2.post(f"{server.url}/v1/chat/completions", json={"model": "base", "messages": HI})
        assert response.status_code == 400
        assert "no chat template" in response.json()["error"]["message"]


def test_what_cannot_be_served_is_said_in_two_lines(tmp_path, model):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        found = finish([*QUANTKIT, "serve", str(model), "--port", port])
    assert (found.returncode, "another --port" in found.stderr) == (2, True)
    missing = finish([*QUANTKIT, "serve", str(tmp_path / "nowhere"), "--port", "0"])
    assert (missing.returncode, "no such file" in missing.stderr) == (2, True)
    too_small = finish([*QUANTKIT, "serve", str(model), "--port", "0", "--max-num-batched-tokens", "4"])
    assert (too_small.returncode, "max_num_batched_tokens" in too_small.stderr) == (2, True)


# under load


def test_the_load_generator_counts_what_the_server_served(server, http, capsys):
    before = metric(http, "vllm:generation_tokens_total")
    options = ("--api-key", KEY, "--requests", "6", "--prompt-tokens", "9", "--output-tokens", "5", "--json")
    for endpoint in ("completions", "chat"):
        load = ("--concurrency", "3", "--endpoint", endpoint, "--vocab-size", "250")
        assert run(["bench", "serve", "--url", server.url, *load, *options]) == 0
        report = json.loads(capsys.readouterr().out)
        assert (report["num_answered"], report["errors"], report["has_usage"]) == (6, {}, True)
        assert report["num_output_tokens"] == 30
    assert (
        metric(http, "vllm:generation_tokens_total") == before + 2 * 7 * 5
    )  # one more goes ahead of each load


def test_the_load_generator_counts_what_the_server_refuses(server, capsys):
    load = ("--concurrency", "30", "--requests", "30", "--output-tokens", "100", "--vocab-size", "250")
    assert run(["bench", "serve", "--url", server.url, "--api-key", KEY, *load, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["errors"]) == {"HTTP 429"}
    assert report["num_answered"] + report["errors"]["HTTP 429"] == 30
