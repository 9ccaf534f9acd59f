"""The engine process: messages in, a step, messages out. It knows nothing of HTTP, and ends when its socket does.

python -m quantkit.server.engine_process FD
"""

import os
import queue
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import NamedTuple

from llguidance import LLMatcher

from quantkit.env import keep_freed_memory
from quantkit.errors import GenerationError, QuantkitError
from quantkit.runtime.detokenizer import UNFINISHED
from quantkit.runtime.heap import keep_what_lives_on
from quantkit.runtime.llm import LLM
from quantkit.runtime.outputs import CompletionOutput, Logprob, RequestOutput
from quantkit.runtime.requests import Requests
from quantkit.runtime.sampling_params import SamplingParams
from quantkit.runtime.start import chosen_device
from quantkit.runtime.tokenizer import Tokenizer
from quantkit.server.logs import log_as_json, logger
from quantkit.server.messages import (
    Abort,
    CannotStart,
    Choice,
    ChosenToken,
    Decoder,
    Delta,
    Failed,
    Message,
    Ping,
    Progress,
    Ready,
    Refused,
    Start,
    Stats,
    Stepped,
    Submit,
    encode,
)
from quantkit_kernels.paged_kv import BLOCK_SIZE

RECEIVE_BYTES = 1 << 18
CPU_NICENESS = 5  # of threads that multiply: HTTP, on the same cores, answers before a step is done
LEAST = -9999.0  # log probability: JSON has no infinity


class Connection:
    """The socket to the HTTP process. A thread reads it, so that its end ends this process whatever else goes on.

    Neither a model that loads nor a kernel that hangs keeps the process, and its GPU, after nobody can reach it.
    """

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._decoder = Decoder()
        self._received: queue.SimpleQueue[bytes | Compiled] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="inbox", daemon=True).start()

    def send(self, message: Message) -> None:
        """Waits while the other end is behind, which reads whatever its clients do."""
        self._socket.sendall(encode(message))

    def receive(self, *, waits: bool) -> "list[Message | Compiled]":
        """The messages that have come, and what was put among them. waits: for at least one."""
        messages: list[Message | Compiled] = []
        while (waits and not messages) or not self._received.empty():
            received = self._received.get()
            messages += self._decoder.feed(received) if isinstance(received, bytes) else [received]
        return messages

    def put(self, compiled: "Compiled") -> None:
        """Something of this process's own, as if it had come."""
        self._received.put(compiled)

    def _read(self) -> None:
        with suppress(ConnectionError):
            while data := self._socket.recv(RECEIVE_BYTES):
                self._received.put(data)
        os._exit(0)


class Compiled(NamedTuple):
    """A request, and its grammar or what is wrong with it."""

    submit: Submit
    found: LLMatcher | QuantkitError | None


class Inbox:
    """Messages to requests. A thread beside the loop compiles grammars: a request is added when its own is ready."""

    def __init__(self, requests: Requests, connection: Connection) -> None:
        self._requests = requests
        self._connection = connection
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._compiling: set[str] = set()

    def take(self, message: Message | Compiled) -> None:
        """Do what a message says."""
        match message:
            case Submit(request_id, _, {"structured_outputs": wanted}) if wanted:
                self._compiling.add(request_id)
                self._compiler.submit(self._compile, message)
            case Submit():
                self._add(Compiled(message, None))
            case Compiled(submit):
                if submit.request_id in self._compiling:
                    self._compiling.remove(submit.request_id)
                    self._add(message)
            case Abort(request_id):
                self._compiling.discard(request_id)
                self._requests.end(request_id)
            case Ping():
                pass  # what the step says at its end is the answer
            case _:
                raise AssertionError(f"{type(message).__name__} is not for the engine")

    def _compile(self, submit: Submit) -> None:
        found: LLMatcher | QuantkitError | None
        try:
            found = self._requests.matcher(SamplingParams(**submit.params))
        except QuantkitError as error:
            found = error
        self._connection.put(Compiled(submit, found))

    def _add(self, compiled: Compiled) -> None:
        (request_id, prompt_ids, params), found = compiled
        try:
            if isinstance(found, QuantkitError):
                raise found
            self._requests.add(
                request_id, None, prompt_ids, SamplingParams(**params), is_streamed=True, matcher=found
            )
        except QuantkitError as error:
            self._connection.send(Refused(request_id, error.problem, error.fix))


def main() -> None:
    """Serve one HTTP process; never returns."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # meant for the HTTP process, which lets running requests end
    log_as_json()
    keep_freed_memory()
    connection = Connection(socket.socket(fileno=int(sys.argv[1])))
    (start,) = connection.receive(waits=True)
    assert isinstance(start, Start), "the first message says what to load"
    try:
        if chosen_device(start.settings.get("device")).type == "cpu":
            os.nice(CPU_NICENESS)
        llm = LLM(start.model, announce=lambda line: connection.send(Progress(line)), **start.settings)
    except QuantkitError as error:
        connection.send(CannotStart(error.problem, error.fix))
        sys.exit(2)
    ready = _ready(llm, start)
    keep_what_lives_on()
    connection.send(ready)
    inbox = Inbox(llm.requests, connection)
    while True:
        serve_once(llm, connection, inbox)


def serve_once(llm: LLM, connection: Connection, inbox: Inbox) -> None:
    """Take what has come, waiting for it if there is nothing to do, and compute a step."""
    requests = llm.requests
    for message in connection.receive(waits=not requests.has_work):
        inbox.take(message)
    began = time.monotonic()  # and not after the step: on a CPU, it has computed the prompts by then
    begun, outputs = _step(requests, connection) if requests.has_work else ([], [])
    stats = requests.stats
    connection.send(
        Stepped(
            begun,
            began,
            [_delta(output, llm.tokenizer) for output in outputs],
            Stats(
                stats.num_waiting,
                stats.num_running,
                stats.kv_usage,
                stats.num_prefix_queries,
                stats.num_prefix_hits,
                stats.num_preemptions,
            ),
        )
    )


def _step(requests: Requests, connection: Connection) -> tuple[list[str], list[RequestOutput]]:
    """A step; where the device's memory does not do, the newest request makes room instead."""
    try:
        return requests.step()
    except GenerationError as error:
        newest = requests.newest_running()
        logger.exception("a request makes room")
        requests.end(newest)
        connection.send(Failed(newest, error.problem))
        return [], []


def _ready(llm: LLM, start: Start) -> Ready:
    started = llm.started
    began = time.perf_counter()
    llm.requests.prepare_grammars()  # streams would stand still for it
    return Ready(
        pid=os.getpid(),
        vocab_size=started.model.spec.vocab_size,
        max_model_len=started.max_model_len,
        max_num_seqs=start.settings["max_num_seqs"],
        num_kv_tokens=started.num_kv_tokens,
        block_size=BLOCK_SIZE,
        device=str(started.model.target.device),
        seconds={**started.seconds, "grammars": time.perf_counter() - began},
    )


def _delta(output: RequestOutput, tokenizer: Tokenizer) -> Delta:
    return Delta(
        output.request_id,
        [_choice(answer, tokenizer) for answer in output.outputs],
        output.finished,
        output.num_cached_tokens,
        output.metrics.first_token_time,
    )


def _choice(answer: CompletionOutput, tokenizer: Tokenizer) -> Choice:
    logprobs = None
    if answer.logprobs is not None:
        pairs = zip(answer.token_ids, answer.logprobs, strict=True)
        logprobs = [_chosen_token(token_id, each, tokenizer) for token_id, each in pairs]
    return Choice(
        answer.index,
        answer.text,
        len(answer.token_ids),
        answer.finish_reason,
        answer.stop_reason,
        logprobs,
    )


def _chosen_token(token_id: int, each: dict[int, Logprob], tokenizer: Tokenizer) -> ChosenToken:
    """Of the token that was chosen, and of the likeliest, which it may be one of."""
    known = {
        other: (_text(other, found.decoded_token, tokenizer), max(found.logprob, LEAST))
        for other, found in each.items()
    }
    return ChosenToken(*known[token_id], list(known.values()))


def _text(token_id: int, decoded: str, tokenizer: Tokenizer) -> str | bytes:
    if UNFINISHED not in decoded:
        return decoded
    return tokenizer.bytes_of_one(token_id) or decoded


if __name__ == "__main__":
    main()
