"""The engine process's inbox: requests whose grammars are compiled beside the loop."""

import dataclasses
import queue
import threading

import pytest

from quantkit.errors import GenerationError
from quantkit.runtime.sampling_params import SamplingParams
from quantkit.server.engine_process import Inbox
from quantkit.server.messages import Abort, Refused, Submit

GUIDED = dataclasses.asdict(SamplingParams(structured_outputs={"json_object": True}))


class Requests:
    """Compiles when it is told to, and notes what else it is asked for."""

    def __init__(self, error=None):
        self.error = error
        self.may_compile = threading.Event()
        self.added, self.ended = [], []

    def matcher(self, params):
        assert params.structured_outputs.json_object
        assert self.may_compile.wait(10)
        if self.error is not None:
            raise self.error
        return "matcher"

    def add(self, request_id, text, prompt_ids, params, *, is_streamed, matcher):
        self.added.append((request_id, matcher))

    def end(self, request_id):
        self.ended.append(request_id)


class Connection:
    def __init__(self):
        self.put_in, self.sent = queue.SimpleQueue(), []
        self.put, self.send = self.put_in.put, self.sent.append


@pytest.fixture
def connection():
    return Connection()


def test_others_are_added_while_a_grammar_is_compiled(connection):
    requests = Requests()
    inbox = Inbox(requests, connection)
    inbox.take(Submit("guided", [1], GUIDED))
    inbox.take(Submit("free", [1], dataclasses.asdict(SamplingParams())))
    assert requests.added == [("free", None)]
    requests.may_compile.set()
    inbox.take(connection.put_in.get(timeout=10))
    assert requests.added[1:] == [("guided", "matcher")]


def test_what_is_aborted_meanwhile_is_not_added(connection):
    requests = Requests()
    inbox = Inbox(requests, connection)
    inbox.take(Submit("guided", [1], GUIDED))
    inbox.take(Abort("guided"))
    requests.may_compile.set()
    inbox.take(connection.put_in.get(timeout=10))
    assert requests.added == [] and requests.ended == ["guided"] and connection.sent == []


def test_a_grammar_that_cannot_be_compiled_is_refused(connection):
    requests = Requests(GenerationError("no", fix="yes"))
    requests.may_compile.set()
    inbox = Inbox(requests, connection)
    inbox.take(Submit("guided", [1], GUIDED))
    inbox.take(connection.put_in.get(timeout=10))
    assert connection.sent == [Refused("guided", "no", "yes")] and requests.added == []
