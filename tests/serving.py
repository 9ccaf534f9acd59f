"""A real server: `quantkit serve` in a process of its own, what it logs, and what it holds."""

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx2

from tests.command_line import ENVIRONMENT, QUANTKIT, ROOT

START_SECONDS = 240
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


class Server:
    """A running one. logged: its log lines so far, as objects."""

    def __init__(self, model: Path | str, *options: str, environment: dict[str, str] | None = None) -> None:
        self.logged: list[dict[str, Any]] = []
        self.process = subprocess.Popen(
            [*QUANTKIT, "serve", str(model), "--port", "0", *options],
            cwd=ROOT,
            env=ENVIRONMENT | ONE_THREAD | (environment or {}),
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.port = self.line("listening")["port"]
        self.url = f"http://127.0.0.1:{self.port}"

    def line(self, message: str, **fields: Any) -> dict[str, Any]:
        """The first log line with this message and these fields; waits for it."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            for line in list(self.logged):
                if line.get("message") == message and fields.items() <= line.items():
                    return line
            if self.process.poll() is not None and not self._reader.is_alive():
                break
            time.sleep(0.02)
        raise AssertionError(f"no line {message!r} {fields} in {self.logged}")

    def wait_until_ready(self) -> int:
        """The engine process's id."""
        pid: int = self.line("ready")["pid"]
        return pid

    def exit_code(self) -> int:
        """Wait for the end."""
        code = self.process.wait(60)
        self._reader.join()
        return code

    def kill(self) -> None:
        self.process.kill()
        self.exit_code()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            for line in lines:
                try:
                    self.logged.append(json.loads(line))
                except json.JSONDecodeError:
                    self.logged.append({"message": line})


@contextmanager
def serving(model: Path | str, *options: str, environment: dict[str, str] | None = None) -> Iterator[Server]:
    """A server that is ready, and gone afterwards."""
    server = Server(model, *options, environment=environment)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.kill()


def metric(http: httpx2.Client, name: str) -> float:
    """The sum over all labels."""
    lines = [line for line in http.get("/metrics").text.splitlines() if line.startswith(f"{name}{{")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def is_idle(http: httpx2.Client) -> bool:
    """Whether nothing runs, waits, or holds a block of the KV cache."""
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    return all(metric(http, f"vllm:{name}") == 0 for name in names)


def wait_until(condition: Callable[[], bool], seconds: float = 100) -> None:
    """Look again and again."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not come to that"
        time.sleep(0.05)


class Held(NamedTuple):
    """What a process holds."""

    num_bytes: int
    num_files: int


def held(pid: int) -> Held:
    """Resident memory and open files, sockets among them."""
    num_pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    num_files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return Held(num_pages * os.sysconf("SC_PAGE_SIZE"), num_files)


def waited(pid: int) -> float:
    """Seconds in which a process's first thread was ready to run, and had no core."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
