"""The engine's end: messages in, a step, messages out, with a tiny model and no socket."""

import dataclasses
import time

import pytest
import torch

from quantkit import LLM, SamplingParams
from quantkit.server.engine_process import Inbox, serve_once
from quantkit.server.messages import Abort, Failed, Refused, Stepped, Submit
from tests.tiny_chat import save_tiny_chat

PARAMS = SamplingParams(max_tokens=8, ignore_eos=True)


class FakeConnection:
    """What the HTTP process sends, and what it is sent."""

    def __init__(self, requests):
        self.incoming = []
        self.sent = []
        self.inbox = Inbox(requests, self)

    def send(self, message):
        self.sent.append(message)

    def receive(self, *, waits):
        assert self.incoming or not waits, "it would wait for ever"
        messages, self.incoming = self.incoming, []
        return messages


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = save_tiny_chat(tmp_path_factory.mktemp("tiny") / "model", max_positions=64)
    return LLM(folder, device="cpu", max_num_seqs=4)


@pytest.fixture
def connection(llm):
    return FakeConnection(llm.requests)


def submit(request_id, prompt_ids, params=PARAMS):
    return Submit(request_id, prompt_ids, dataclasses.asdict(params))


def run(llm, connection, *messages):
    """Until there is nothing to do; all deltas."""
    connection.incoming += messages
    serve_once(llm, connection, connection.inbox)
    while llm.requests.has_work:
        serve_once(llm, connection, connection.inbox)
    return [delta for message in connection.sent if isinstance(message, Stepped) for delta in message.deltas]


def test_an_answer_comes_in_deltas(llm, connection):
    expected = llm.generate([[5, 6, 7]], PARAMS)[0].outputs[0]
    deltas = run(llm, connection, submit("a", [5, 6, 7]))
    choices = [choice for delta in deltas for choice in delta.choices]
    assert "".join(choice.text for choice in choices) == expected.text
    assert sum(choice.num_tokens for choice in choices) == len(expected.token_ids)
    assert [delta.is_finished for delta in deltas] == [False] * (len(deltas) - 1) + [True]
    assert [message.begun for message in connection.sent if message.begun] == [["a"]]
    assert connection.sent[-1].stats.num_running == 0


def test_a_request_has_begun_when_its_first_step_began(llm, connection, monkeypatch):
    launch, launched = llm.started.engine._runner.launch, []

    def noted(plan):
        launched.append(time.monotonic())
        return launch(plan)

    monkeypatch.setattr(llm.started.engine._runner, "launch", noted)
    before = time.monotonic()
    run(llm, connection, submit("a", [5, 6, 7]))
    (first,) = (message for message in connection.sent if message.begun)
    assert before <= first.time <= launched[0]


def test_log_probabilities_of_tokens_that_are_no_characters_are_of_bytes(llm, connection):
    params = SamplingParams(max_tokens=2, logprobs=20, ignore_eos=True)
    deltas = run(llm, connection, submit("a", [5], params))
    tokens = [token for delta in deltas for choice in delta.choices for token in choice.tokens]
    texts = [text for token in tokens for text, _ in token.likeliest]
    assert any(isinstance(text, bytes) for text in texts)
    assert all(len({text for text, _ in token.likeliest}) == 20 for token in tokens)
    assert all(token.logprob == max(value for _, value in token.likeliest) for token in tokens)  # greedy


def test_what_is_aborted_says_no_more(llm, connection):
    connection.incoming = [submit("a", [5]), submit("b", [6])]
    serve_once(llm, connection, connection.inbox)
    before = len(connection.sent)
    run(llm, connection, Abort("a"), Abort("never there"))
    after = [delta.request_id for message in connection.sent[before:] for delta in message.deltas]
    assert set(after) == {"b"}
    run(llm, connection, Abort("b"))
    assert llm.requests.stats.kv_usage == 0


def test_what_the_engine_cannot_take_is_refused(llm, connection):
    assert run(llm, connection, submit("a", [5] * 64)) == []
    assert isinstance(connection.sent[0], Refused)
    assert "64 tokens" in connection.sent[0].problem


def test_the_newest_makes_room_where_the_memory_does_not_do(llm, connection, monkeypatch):
    launch = llm.started.engine._runner.launch

    def full(plan):
        if len(plan.rows) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return launch(plan)

    monkeypatch.setattr(llm.started.engine._runner, "launch", full)
    deltas = run(llm, connection, submit("old", [5]), submit("new", [6]))
    (failed,) = (message for message in connection.sent if isinstance(message, Failed))
    assert failed.request_id == "new"
    assert {delta.request_id for delta in deltas} == {"old"}
    assert deltas[-1].is_finished
