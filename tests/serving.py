"""A real server: `quantkit serve` in a process of its own, and what it logs."""

import json
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
