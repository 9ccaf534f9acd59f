"""Disk work beside the computing of a GPU: the next layer is read and the last one written meanwhile.

One thread each, and one thing at a time in each, so what is read and written is the same as without them. On a CPU the
threads would only take the cores from the computing, and the memory of another layer: there everything is done in turn.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor


class ReadAhead:
    """Layers by number, in ascending order; with is_ahead the next one is read before it is asked for.

    read: a layer's tensors; they come in pinned memory with is_ahead. Holds one layer more than was asked for.
    """

    def __init__(self, read: Callable[[int], dict[str, Tensor]], stop: int, *, is_ahead: bool) -> None:
        self._read = read
        self._stop = stop
        self._thread = ThreadPoolExecutor(1) if is_ahead else None
        self._next: tuple[int, Future[dict[str, Tensor]]] | None = None

    def layer(self, number: int) -> dict[str, Tensor]:
        """The tensors of a layer, as `read` returns them."""
        if self._thread is None:
            return self._read(number)
        if self._next is None or self._next[0] != number:
            self._next = number, self._thread.submit(self._read_pinned, number)
        tensors = self._next[1].result()
        following = number + 1
        self._next = None
        if following < self._stop:
            self._next = following, self._thread.submit(self._read_pinned, following)
        return tensors

    def _read_pinned(self, number: int) -> dict[str, Tensor]:
        # copies from pinned memory run at the bus's speed
        return {name: tensor.pin_memory() for name, tensor in self._read(number).items()}


class WriteBehind:
    """Writes in the order in which they are given; with is_behind the last one goes on while the caller does."""

    def __init__(self, *, is_behind: bool) -> None:
        self._thread = ThreadPoolExecutor(1) if is_behind else None
        self._last: Future[None] | None = None

    def write(self, work: Callable[[], None]) -> None:
        """Do the work, after the one before; what that one raised is raised here."""
        if self._thread is None:
            work()
            return
        self.wait()
        self._last = self._thread.submit(work)

    def wait(self) -> None:
        """Until everything is written; raises what the last work raised."""
        if self._last is not None:
            last, self._last = self._last, None
            last.result()
