"""CUDA graphs: of decode steps, and of chunks of prompts, from a few numbers to logits.

    decode     sequences   1 2 4 8 | 16 24 32 48 64 … 256          captured at the start | when first needed
    chunks     tokens      64 128 256 512 | 192 … 2048             at most SEQUENCES of them
    contexts   2k | 8k 32k, the longest                            the launch of attention depends on what may come

A step takes the next size; what is left is padding, which stores nothing. A graph keeps its logits and shares memory
for everything between with the others: one runs at a time. A chunk's kernels take less time than a host needs to launch
them one by one, up to about 2048 tokens.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.runtime.packed import fill

SMALL = (1, 2, 4, 8)
SIZES = (*SMALL, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
FEW_TOKENS = (64, 128, 256, 512)
TOKENS = tuple(sorted({*FEW_TOKENS, *range(64, 512, 64), *range(512, 1024, 128), *range(1024, 2049, 256)}))
SEQUENCES = 8
CONTEXTS = (2048, 8192, 32768)
DRIVER_BYTES = 16 << 20  # of a graph of some hundred kernels

Capture = Callable[
    [Callable[[], Tensor]], tuple[Callable[[], None], Tensor]
]  # -> how to run it again, its output


class SampledLogits(NamedTuple):
    """Of the sequences that sample, until the next run: logits, rows and lengths, int32."""

    logits_BV: Tensor
    row_B: Tensor
    length_B: Tensor


class ChunkInputs(NamedTuple):
    """A step of chunks on the device, padding included, int32.

    T: tokens. C: sequences. S: those that sample: the places of their last tokens, rows and lengths.
    """

    token_ids_T: Tensor
    positions_T: Tensor
    slots_T: Tensor
    row_C: Tensor
    length_C: Tensor
    offsets: Tensor
    last_S: Tensor
    row_S: Tensor
    length_S: Tensor


def cuda_capture(device: torch.device) -> Capture:
    """Graphs that share one pool of memory.

    Captured on a stream of this device: torch's own is of whichever device captured first. What other threads do
    meanwhile, loading another model say, does not end a capture.
    """
    pool = torch.cuda.graph_pool_handle()
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def capture(function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        function()  # compiles whatever these sizes need
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            output = function()
        return graph.replay, output

    return capture


def graph_sizes(num_rows: int) -> list[int]:
    """Batch sizes of graphs for at most so many rows."""
    largest = min(num_rows, SIZES[-1])
    return [size for size in SIZES if size < largest] + [largest]


def context_sizes(max_model_len: int) -> list[int]:
    """Longest contexts of graphs."""
    return [context for context in CONTEXTS if context < max_model_len] + [max_model_len]


def graph_bytes(num_rows: int, max_model_len: int, vocab_size: int, dtype: torch.dtype) -> int:
    """What all graphs keep: their logits, and what the driver takes for the nodes."""
    sizes = graph_sizes(num_rows)
    num_logits = (sum(sizes) + SEQUENCES * len(TOKENS)) * vocab_size
    one_context = num_logits * dtype.itemsize + (len(sizes) + len(TOKENS)) * DRIVER_BYTES
    return len(context_sizes(max_model_len)) * one_context


class DecodeGraphs:
    """decode_logits(row_B, length_B, max_context) -> logits_BV, captured. padding_row: the row of what fills up."""

    def __init__(
        self,
        decode_logits: Callable[[Tensor, Tensor, int], Tensor],
        capture: Capture,
        *,
        padding_row: int,
        max_model_len: int,
        device: torch.device,
    ) -> None:
        self._decode_logits = decode_logits
        self._capture = capture
        self._padding_row = padding_row
        self._sizes = graph_sizes(padding_row)
        self._contexts = context_sizes(max_model_len)
        self._inputs_2B = torch.empty(2, self._sizes[-1], dtype=torch.int32, device=device)
        self._captured: dict[tuple[int, int], tuple[Callable[[], None], Tensor]] = {}

    def takes(self, num_rows: int) -> bool:
        """Whether there is a size for a batch."""
        return num_rows <= self._sizes[-1]

    def capture_small(self) -> None:
        """Capture what a single user needs, the largest first."""
        for size in reversed(self._sizes):
            if size in SMALL:
                self._graph(size, self._contexts[0])

    def run(self, rows: Sequence[int], lengths: Sequence[int]) -> SampledLogits:
        """A step of one new token each."""
        size = next(size for size in self._sizes if size >= len(rows))
        padding = size - len(rows)
        replay, logits_BV = self._graph(
            size, next(context for context in self._contexts if context >= max(lengths))
        )
        fill(self._inputs_2B, ([*rows, *[self._padding_row] * padding], [*lengths, *[1] * padding]))
        replay()
        row_B, length_B = self._inputs_2B[:, : len(rows)]
        return SampledLogits(logits_BV[: len(rows)], row_B, length_B)

    def _graph(self, size: int, context: int) -> tuple[Callable[[], None], Tensor]:
        if (size, context) not in self._captured:
            row_B, length_B = self._inputs_2B[0, :size], self._inputs_2B[1, :size]
            row_B.fill_(self._padding_row)  # the step before is still there, and would be computed once more
            length_B.fill_(1)
            self._captured[size, context] = self._capture(
                lambda: self._decode_logits(row_B, length_B, context)
            )
        return self._captured[size, context]


class ChunkGraphs:
    """chunk_logits(inputs, max_context) -> logits_SV, captured."""

    def __init__(
        self,
        chunk_logits: Callable[[ChunkInputs, int], Tensor],
        capture: Capture,
        *,
        padding_row: int,
        max_model_len: int,
        device: torch.device,
    ) -> None:
        self._chunk_logits = chunk_logits
        self._capture = capture
        self._padding_row = padding_row
        self._contexts = context_sizes(max_model_len)
        self._inputs = torch.empty(len(ChunkInputs._fields), TOKENS[-1], dtype=torch.int32, device=device)
        self._captured: dict[tuple[int, int], tuple[Callable[[], None], Tensor]] = {}

    def takes(self, num_tokens: int, num_sequences: int) -> bool:
        """Whether there is a size for a step."""
        return num_tokens <= TOKENS[-1] and num_sequences <= SEQUENCES

    def capture_small(self) -> None:
        """Capture what a single user's prompts need, the longest first."""
        for num_tokens in reversed(FEW_TOKENS):
            self._graph(num_tokens, self._contexts[0])

    def run(self, parts: Sequence[Sequence[int]]) -> SampledLogits:
        """A step. parts: those of `ChunkInputs`, without padding."""
        num_tokens, num_samples, lengths = len(parts[0]), len(parts[6]), parts[4]
        size = next(size for size in TOKENS if size >= num_tokens)
        replay, logits_SV = self._graph(
            size, next(context for context in self._contexts if context >= max(lengths))
        )
        fill(self._inputs, self._padded(parts, size))
        replay()
        inputs = self._of_size(size)
        return SampledLogits(
            logits_SV[:num_samples], inputs.row_S[:num_samples], inputs.length_S[:num_samples]
        )

    def _graph(self, size: int, context: int) -> tuple[Callable[[], None], Tensor]:
        if (size, context) not in self._captured:
            fill(self._inputs, self._padded([[], [], [], [], [], [0], [], [], []], size))
            inputs = self._of_size(size)
            self._captured[size, context] = self._capture(lambda: self._chunk_logits(inputs, context))
        return self._captured[size, context]

    def _padded(self, parts: Sequence[Sequence[int]], size: int) -> list[list[int]]:
        """Tokens that are stored nowhere, sequences of nothing."""
        sizes = [size] * 3 + [SEQUENCES] * 2 + [SEQUENCES + 1] + [SEQUENCES] * 3
        fillers = [0, 0, -1, self._padding_row, 0, parts[5][-1], 0, self._padding_row, 0]
        return [
            [*part, *[filler] * (count - len(part))]
            for part, count, filler in zip(parts, sizes, fillers, strict=True)
        ]

    def _of_size(self, size: int) -> ChunkInputs:
        """Views of what `_padded` fills."""
        sizes = [size] * 3 + [SEQUENCES] * 2 + [SEQUENCES + 1] + [SEQUENCES] * 3
        return ChunkInputs(*(row[:count] for row, count in zip(self._inputs, sizes, strict=True)))
