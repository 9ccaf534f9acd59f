"""Load on a server: when requests are sent, and what came of each.

rate         open: requests come as a Poisson process does, whether or not the server keeps up
concurrency  closed: so many are under way at any time; the next is sent when one ends
"""

import asyncio
import random
import time
from collections.abc import Sequence
from typing import NamedTuple

from quantkit.bench.sse_client import Answer, Server, stream


class Outcome(NamedTuple):
    """Of one request. sent: seconds from the beginning of the run."""

    sent: float
    answer: Answer


class Run(NamedTuple):
    """Outcomes in the order of sending. busy: share of one core that this process used meanwhile."""

    outcomes: list[Outcome]
    busy: float


async def run_load(
    server: Server,
    path: str,
    bodies: Sequence[bytes],
    *,
    rate: float | None,
    concurrency: int | None,
    timeout: float,
    seed: int = 0,
) -> Run:
    """Send each body once, at a rate a second or so many at a time: one of the two is given."""
    load = _Load(server, path, timeout)
    used = time.process_time()
    if rate is not None:
        await load.arrive(bodies, rate, random.Random(seed))
    else:
        assert concurrency is not None, "one of the two is given"
        await load.keep_busy(bodies, concurrency)
    seconds = time.perf_counter() - load.began
    outcomes = sorted(load.outcomes, key=lambda outcome: outcome.sent)
    return Run(outcomes, (time.process_time() - used) / seconds)


class _Load:
    def __init__(self, server: Server, path: str, timeout: float) -> None:
        self.outcomes: list[Outcome] = []
        self.began = time.perf_counter()
        self._server = server
        self._path = path
        self._timeout = timeout

    async def arrive(self, bodies: Sequence[bytes], rate: float, numbers: random.Random) -> None:
        """Times between arrivals are exponential; each is reckoned from the one before, so no delay adds up."""
        due = self.began
        async with asyncio.TaskGroup() as tasks:
            for body in bodies:
                await asyncio.sleep(due - time.perf_counter())
                tasks.create_task(self._send(body))
                due += numbers.expovariate(rate)

    async def keep_busy(self, bodies: Sequence[bytes], concurrency: int) -> None:
        """As many senders as requests may be under way, each with one at a time."""
        remaining = iter(bodies)

        async def sender() -> None:
            for body in remaining:
                await self._send(body)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(min(concurrency, len(bodies))):
                tasks.create_task(sender())

    async def _send(self, body: bytes) -> None:
        sent = time.perf_counter() - self.began
        answer = await stream(self._server, self._path, body, self._timeout)
        self.outcomes.append(Outcome(sent, answer))
