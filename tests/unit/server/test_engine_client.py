"""Messages to generations, and what is counted on the way; the engine is the other end of a socket pair."""

import asyncio
import socket
from contextlib import asynccontextmanager

import pytest

from quantkit.runtime.sampling_params import SamplingParams
from quantkit.server import generation as generation_module
from quantkit.server.admission import Admission
from quantkit.server.engine_client import EngineClient
from quantkit.server.errors import ApiError, unavailable
from quantkit.server.messages import (
    Abort,
    Choice,
    Decoder,
    Delta,
    Failed,
    Ping,
    Refused,
    Stats,
    Stepped,
    Submit,
    encode,
)
from quantkit.server.metrics import Metrics

STATS = Stats(0, 1, 0.5, 10, 5, 0)
BOTH = SamplingParams(n=2)


class FakeEngine:
    """The other end. received: messages so far."""

    def __init__(self, end):
        self._end = end
        self._decoder = Decoder()
        self.received = []

    async def read(self, count):
        """Until there are so many messages."""
        loop = asyncio.get_running_loop()
        while len(self.received) < count:
            self.received += self._decoder.feed(await loop.sock_recv(self._end, 1 << 16))
        return self.received

    async def say(self, message):
        await asyncio.get_running_loop().sock_sendall(self._end, encode(message))
        await asyncio.sleep(0.01)

    async def die(self):
        self._end.close()
        await asyncio.sleep(0.01)


@asynccontextmanager
async def connected(**bounds):
    admission = Admission(**{"max_sequences": 8, "max_waiting_tokens": 100, **bounds})
    ours, theirs = socket.socketpair()
    client = EngineClient(admission, Metrics("m"), ours)
    theirs.setblocking(False)
    with theirs:
        await client.connect()
        yield client, FakeEngine(theirs), admission
        client.close()
        await asyncio.sleep(0)


def submit(client, *prompts, params=BOTH, is_streamed=True):
    return client.submit(prompts, params, arrival=0.0, is_streamed=is_streamed)


def stepped(begun=(), *deltas):
    return Stepped(list(begun), 0.0, list(deltas), STATS)


def last(part, num_answers=2):
    choices = [Choice(number, "x", 1, "stop", None, None) for number in range(num_answers)]
    return Delta(part, choices, True, 0, None)


def test_what_was_counted_is_given_back_with_the_last_token():
    async def story():
        async with connected() as (client, engine, admission):
            generation = submit(client, [1, 2, 3], [4])
            assert [type(each) for each in await engine.read(2)] == [Submit, Submit]
            assert (admission.num_sequences, admission.num_waiting_tokens) == (4, 4)
            first, second = generation.parts
            await engine.say(stepped([first]))
            assert admission.num_waiting_tokens == 1
            await engine.say(stepped([second], last(first)))
            assert (admission.num_sequences, client.idle.is_set()) == (4, False)
            await engine.say(stepped([], last(second)))
            assert (admission.num_sequences, admission.num_waiting_tokens) == (0, 0)
            assert client.idle.is_set()
            client.end(generation)  # its reader is done, too
            assert admission.num_sequences == 0
            assert len(await anext(generation.pieces())) == 4

    asyncio.run(story())


def test_a_request_waits_until_its_first_step_began():
    async def story():
        async with connected() as (client, engine, _):
            generation = submit(client, [1])
            (part,) = generation.parts
            await engine.say(stepped([part], last(part))._replace(time=0.25))
            assert generation.times.begun == 0.25

    asyncio.run(story())


def test_tokens_are_counted_as_they_come():
    async def story():
        async with connected() as (client, engine, _):
            generation = submit(client, [1, 2, 3], [4])
            first, _ = generation.parts
            piece = Delta(first, [Choice(0, "xy", 2, None, None, None)], False, 0, None)
            await engine.say(stepped([first], piece))
            await engine.say(stepped([], piece))
            rendered = client._metrics.render().decode()
            assert 'vllm:prompt_tokens_total{model_name="m"} 3.0' in rendered
            assert 'vllm:generation_tokens_total{model_name="m"} 4.0' in rendered
            client._metrics.ended(generation, 1.0)
            assert 'vllm:generation_tokens_total{model_name="m"} 4.0' in client._metrics.render().decode()

    asyncio.run(story())


def test_what_cannot_be_sent_is_not_counted():
    async def story():
        async with connected() as (client, _, admission):
            with pytest.raises(UnicodeEncodeError):
                submit(client, [1], params=SamplingParams(stop=("\ud800",)))
            assert (admission.num_sequences, client.idle.is_set()) == (0, True)

    asyncio.run(story())


def test_who_leaves_takes_everything_along():
    async def story():
        async with connected() as (client, engine, admission):
            generation = submit(client, [1, 2], [3])
            await engine.say(stepped(generation.parts[:1], last(generation.parts[0])))
            client.end(generation)
            assert (await engine.read(3))[2:] == [Abort(generation.parts[1])]
            assert (admission.num_sequences, admission.num_waiting_tokens) == (0, 0)
            await engine.say(stepped(generation.parts[1:], last(generation.parts[1])))  # it did not know yet
            assert admission.num_waiting_tokens == 0

    asyncio.run(story())


def test_who_does_not_read_is_aborted(monkeypatch):
    monkeypatch.setattr(generation_module, "MAX_BEHIND_TOKENS", 3)

    async def story():
        async with connected() as (client, engine, admission):
            generation = submit(client, [1])
            piece = Delta(generation.parts[0], [Choice(0, "x", 1, None, None, None)], False, 0, None)
            await engine.say(stepped(generation.parts, piece, piece, piece, piece))
            assert generation.error.code == "slow_client"
            assert (await engine.read(2))[1] == Abort(generation.parts[0])
            assert admission.num_sequences == 0

    asyncio.run(story())


def test_the_engine_may_refuse_and_die():
    async def story():
        async with connected() as (client, engine, _):
            refused, failed, dead = (submit(client, [token]) for token in (1, 2, 3))
            await engine.say(Refused(refused.parts[0], "too long", "shorten it"))
            assert (refused.error.status, refused.error.message) == (400, "too long; shorten it")
            await engine.say(Failed(failed.parts[0], "out of memory"))
            assert (failed.error.status, failed.error.code) == (500, "out_of_memory")
            await engine.die()
            assert client.died.is_set()
            assert dead.error.code == "engine_dead"
            with pytest.raises(ApiError, match="died"):
                submit(client, [3])
            client.end(dead)

    asyncio.run(story())


def test_silence_is_told_from_an_answer():
    async def story():
        async with connected() as (client, engine, _):
            assert not await client.answers(0.01)
            waiting = asyncio.create_task(client.answers(None))
            await asyncio.sleep(0)
            await engine.say(stepped())
            assert await waiting
            assert await engine.read(1) == [Ping()]

    asyncio.run(story())


def test_all_end_when_it_is_time():
    async def story():
        async with connected() as (client, _, _):
            generations = [submit(client, [1]), submit(client, [2], is_streamed=False)]
            client.fail_all(unavailable("stopped", "draining"))
            for generation in generations:
                with pytest.raises(ApiError, match="stopped"):
                    await anext(generation.pieces())
                client.end(generation)
            assert client.idle.is_set()

    asyncio.run(story())
