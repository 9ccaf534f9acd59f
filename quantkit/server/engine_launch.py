"""The engine's process as its parent holds it. Free of torch: launched before anything that takes long."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

EXIT_SECONDS = 5.0  # for it to notice that nobody is left


class EngineProcess(NamedTuple):
    """end: of the socket pair over which it is talked to; it ends when this is closed."""

    process: subprocess.Popen[bytes]
    end: socket.socket

    def exit_code(self) -> int | None:
        """Wait for its end; None: it does not come to that."""
        with suppress(subprocess.TimeoutExpired):
            return self.process.wait(EXIT_SECONDS)
        return None


@contextmanager
def launched_engine() -> Iterator[EngineProcess]:
    """A process that imports what it needs, and then waits for `Start`. It is gone afterwards."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            command = [sys.executable, "-m", "quantkit.server.engine_process", str(theirs.fileno())]
            process = subprocess.Popen(command, pass_fds=(theirs.fileno(),))
        with process:
            try:
                yield EngineProcess(process, ours)
            finally:
                process.kill()  # if it is still there: it hangs in its imports, or in a device's driver
