"""The grammar process, seen from the HTTP process: one grammar at a time, each with so much time, or it is refused."""

import asyncio
import hashlib
import json
import sys
from collections import OrderedDict

from quantkit.runtime.grammar import grammar_text, refused
from quantkit.runtime.structured_outputs import StructuredOutputsParams
from quantkit.server.errors import invalid, overloaded
from quantkit.server.limits import GRAMMAR_SECONDS, MAX_GRAMMARS_WAITING, NUM_GRAMMARS_KNOWN

TOO_LONG = "it takes too long, or too much memory"


class GrammarClient:
    """Starts the process when it is first needed, and after each one that had to be ended."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._num_waiting = 0
        self._fine: OrderedDict[bytes, None] = OrderedDict()  # digests of grammars

    async def check(self, wanted: StructuredOutputsParams, *, param: str) -> None:
        """Raises ApiError, a 400 about `param`, if the grammar cannot be compiled in time; a 429 if many wait."""
        grammar = grammar_text(wanted)
        digest = hashlib.blake2b(grammar.encode()).digest()
        if digest in self._fine:
            self._fine.move_to_end(digest)
            return
        if self._num_waiting >= MAX_GRAMMARS_WAITING:
            raise overloaded("too many grammars wait to be looked at", retry_after=1)
        self._num_waiting += 1
        try:
            async with self._turn:
                problem = await self._problem(grammar)
        finally:
            self._num_waiting -= 1
        if problem is not None:
            raise invalid(refused(problem).problem, param=param)
        self._fine[digest] = None
        if len(self._fine) > NUM_GRAMMARS_KNOWN:
            self._fine.popitem(last=False)

    async def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            await process.wait()

    async def _problem(self, grammar: str) -> str | None:
        is_answered = False
        try:
            process = await self._started()
            assert process.stdin is not None
            process.stdin.write(json.dumps(grammar).encode() + b"\n")
            answer = await asyncio.wait_for(_line(process), GRAMMAR_SECONDS)
            is_answered = bool(answer)
            problem: str | None = json.loads(answer) if answer else TOO_LONG
            return problem
        except TimeoutError:
            return TOO_LONG
        finally:
            if not is_answered:  # it looks on at what nobody waits for
                await self.close()

    async def _started(self) -> asyncio.subprocess.Process:
        if self._process is None:
            pipe = asyncio.subprocess.PIPE
            command = (sys.executable, "-m", "quantkit.server.grammar_process")
            self._process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
            await _line(self._process)
        return self._process


async def _line(process: asyncio.subprocess.Process) -> bytes:
    assert process.stdout is not None
    return await process.stdout.readline()
