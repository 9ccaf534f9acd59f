"""A checkpoint whose tensors arrive on a GPU, read ahead by threads.

    file ──preadv──► pinned buffer of a thread ──async copy──► tensor on the device
    │ layer n + 1 is read … │ while the device repacks layer n │

Each thread has one buffer: host memory is THREADS · BUFFER_BYTES whatever the model's size. Copies are on the stream of
the kernels, in the order of their calls, so that no tensor is used, and no memory used again, before its time.
"""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import local
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.errors import SourceError
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.dequantized import DequantizedCheckpoint, stored_checkpoint
from quantkit.formats.safetensors_file import TensorInfo, as_bytes

THREADS = 8
BUFFER_BYTES = 16 << 20


class _Arriving(NamedTuple):
    """A tensor on the device, and the reads that fill it."""

    tensor: Tensor
    reads: list["Future[None]"]


class DeviceCheckpoint(Checkpoint):
    """`read` gives a tensor on the device; what `expect` named before is on its way already."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        super().__init__(checkpoint.path, checkpoint.config, checkpoint.tensors)
        self._source = checkpoint
        self._stored = stored_checkpoint(checkpoint)
        self._device = device
        self._threads = ThreadPoolExecutor(THREADS, "read-checkpoint")
        self._of_thread = local()
        self._arriving: dict[str, _Arriving] = {}

    def expect(self, names: Iterable[str]) -> None:
        """Start to read tensors, but those to dequantize; they take their memory on the device now."""
        for name in names:
            if name not in self._arriving and name in self._stored.tensors:
                self._arriving[name] = self._start(self.info(name))

    def read(self, name: str) -> Tensor:
        """The whole tensor, as the checkpoint gives it."""
        if isinstance(self._source, DequantizedCheckpoint) and name in self._source.modules:
            return self._source.dequantized(name, self._read_stored)
        return self._read_stored(name)

    def _read_stored(self, name: str) -> Tensor:
        arriving = self._arriving.pop(name, None) or self._start(self._stored.info(name))
        for read in arriving.reads:
            read.result()
        return arriving.tensor

    def close(self) -> None:
        """End the threads and free their buffers."""
        self._threads.shutdown(cancel_futures=True)
        self._arriving.clear()

    def _start(self, info: TensorInfo) -> _Arriving:
        tensor = torch.empty(info.shape, dtype=info.dtype, device=self._device)
        raw = tensor.reshape(-1).view(torch.uint8)
        return _Arriving(
            tensor, [self._threads.submit(self._fill, raw, info, start) for start in _starts(info.num_bytes)]
        )

    def _fill(self, raw: Tensor, info: TensorInfo, start: int) -> None:
        """Bytes from `start` on, as many as the buffer holds, of a tensor's file into its memory."""
        with torch.cuda.device(self._device):
            buffer, copied = self._own_buffer()
            copied.synchronize()
            length = min(BUFFER_BYTES, info.num_bytes - start)
            _read_into(as_bytes(buffer[:length]), info, info.begin + start)
            raw[start : start + length].copy_(buffer[:length], non_blocking=True)
            copied.record()

    def _own_buffer(self) -> tuple[Tensor, torch.cuda.Event]:
        """This thread's pinned buffer, and the event after which it may be written again."""
        if not hasattr(self._of_thread, "buffer"):
            self._of_thread.buffer = torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=True)
            self._of_thread.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        return self._of_thread.buffer, self._of_thread.copied


def _starts(num_bytes: int) -> Iterator[int]:
    return iter(range(0, num_bytes, BUFFER_BYTES))


def _read_into(view: memoryview, info: TensorInfo, position: int) -> None:
    with info.file.open("rb", buffering=0) as file:
        done = 0
        while done < len(view):
            count = os.preadv(file.fileno(), [view[done:]], position + done)
            if count == 0:
                raise SourceError(
                    f"{info.file}: ended inside tensor {info.name}", fix="fetch this file again"
                )
            done += count
