"""CUDA graphs of decode steps: one per batch size and longest context, from row numbers and lengths to logits.

    sizes      1 2 4 8 | 16 24 32 48 64 … 256         captured at the start | when first needed
    contexts   2k | 8k 32k, the longest               the launch of attention depends on what may come

A batch takes the next size; what is left are padding rows of length 1. A graph keeps its logits and shares the memory
of everything between with the others: one runs at a time.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.runtime.packed import fill

SMALL = (1, 2, 4, 8)
SIZES = (*SMALL, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
CONTEXTS = (2048, 8192, 32768)
DRIVER_BYTES = 16 << 20  # of a graph of some hundred kernels


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    logits_BV: Tensor


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
    one_context = sum(sizes) * vocab_size * dtype.itemsize + len(sizes) * DRIVER_BYTES
    return len(context_sizes(max_model_len)) * one_context


class DecodeGraphs:
    """decode_logits(row_B, length_B, max_context) -> logits_BV, captured.

    padding_row: the row of what fills a batch up. max_model_len: the longest context.
    """

    def __init__(
        self,
        decode_logits: Callable[[Tensor, Tensor, int], Tensor],
        padding_row: int,
        max_model_len: int,
        device: torch.device,
    ) -> None:
        self._decode_logits = decode_logits
        self._padding_row = padding_row
        self._sizes = graph_sizes(padding_row)
        self._inputs_2B = torch.empty(2, self._sizes[-1], dtype=torch.int32, device=device)
        self._contexts = context_sizes(max_model_len)
        self._captured: dict[tuple[int, int], _Graph] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def takes(self, num_rows: int) -> bool:
        """Whether there is a size for a batch."""
        return num_rows <= self._sizes[-1]

    def capture_small(self) -> None:
        """Capture what a single user needs, the largest first."""
        for size in reversed(self._sizes):
            if size in SMALL:
                self._capture(size, self._contexts[0])

    def run(self, rows: Sequence[int], lengths: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, rows and lengths of a batch; they hold until the next run."""
        size = next(size for size in self._sizes if size >= len(rows))
        padding = size - len(rows)
        context = next(context for context in self._contexts if context >= max(lengths))
        graph = self._captured.get((size, context)) or self._capture(size, context)
        fill(self._inputs_2B, ([*rows, *[self._padding_row] * padding], [*lengths, *[1] * padding]))
        graph.graph.replay()
        row_B, length_B = self._inputs_2B[:, : len(rows)]
        return graph.logits_BV[: len(rows)], row_B, length_B

    def _capture(self, size: int, context: int) -> _Graph:
        row_B, length_B = self._inputs_2B[0, :size], self._inputs_2B[1, :size]
        row_B.fill_(self._padding_row)  # the step before is still there, and would be computed once more
        length_B.fill_(1)
        self._decode_logits(row_B, length_B, context)  # compiles whatever this number of rows needs
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits_BV = self._decode_logits(row_B, length_B, context)
        self._captured[size, context] = _Graph(graph, logits_BV)
        return self._captured[size, context]
