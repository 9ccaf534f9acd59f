"""Clients of a server in a process of their own: many at once, some of whom leave, or hardly read.

    python -m tests.load_clients PORT MODEL CLIENTS SECONDS SEED

For so long, each sends one streamed request after the other; then it waits for its last answer. Prints counts as JSON.
"""

import asyncio
import json
import random
import socket
import sys
import time
from collections import Counter

READ_BYTES = 1 << 16
SLOW_BUFFER_BYTES, SLOW_READ_BYTES, SLOW_SECONDS = 4096, 512, 0.2
MOST_SECONDS = 590  # for one answer, its wait included: less than the server gives it
DONE = b"data: [DONE]\n\n"


class Client:
    """One of them."""

    def __init__(self, port: int, model: str, numbers: random.Random, counts: Counter[str]) -> None:
        self._port = port
        self._model = model
        self._numbers = numbers
        self._counts = counts

    async def run(self, until: float) -> None:
        """Requests until then, and the end of the last one."""
        await asyncio.sleep(self._numbers.uniform(0, 5))
        while time.monotonic() < until:
            try:
                async with asyncio.timeout(MOST_SECONDS):
                    await self._ask()
            except TimeoutError:
                self._counts["never ended"] += 1

    async def _ask(self) -> None:
        kind = self._numbers.choices(("reads", "leaves", "is slow"), (17, 10, 3))[0]
        with socket.socket() as connection:
            connection.setblocking(False)
            if kind == "is slow":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SLOW_BUFFER_BYTES)
            await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", self._port))
            await asyncio.get_running_loop().sock_sendall(connection, self._request())
            await self._read(connection, kind)

    def _request(self) -> bytes:
        text = " ".join(self._numbers.choices(("why", "water", "is", "blue", "and", "deep"), k=12))
        body = {"model": self._model, "prompt": text, "stream": True, "ignore_eos": True}
        body["max_tokens"] = self._numbers.randint(4, 24)
        data = json.dumps(body).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        return head.encode() + data

    async def _read(self, connection: socket.socket, kind: str) -> None:
        """The answer, as far as this kind of client does."""
        loop = asyncio.get_running_loop()
        is_slow, leaves_after = kind == "is slow", self._numbers.uniform(0, 30)
        received = b""
        try:
            async with asyncio.timeout(leaves_after if kind == "leaves" else None):
                while data := await loop.sock_recv(connection, SLOW_READ_BYTES if is_slow else READ_BYTES):
                    received += data
                    if is_slow:
                        await asyncio.sleep(SLOW_SECONDS)
        except TimeoutError:
            self._counts["left"] += 1
            return
        except ConnectionError:
            self._counts["cut off"] += 1
            return
        await self._count(received, kind)

    async def _count(self, received: bytes, kind: str) -> None:
        status = received[9:12].decode()
        if status == "429":
            self._counts["429"] += 1
            await asyncio.sleep(self._numbers.uniform(1, 5))
        elif status != "200":
            self._counts[f"status {status}"] += 1
        else:
            self._counts[kind if DONE in received else "without an end"] += 1


async def main() -> None:
    """All clients, at once."""
    port, model, num_clients, seconds, seed = sys.argv[1:]
    counts: Counter[str] = Counter()
    until = time.monotonic() + float(seconds)
    async with asyncio.TaskGroup() as tasks:
        for number in range(int(num_clients)):
            client = Client(int(port), model, random.Random(f"{seed} {number}"), counts)
            tasks.create_task(client.run(until))
    print(json.dumps(counts))


if __name__ == "__main__":
    asyncio.run(main())
