"""How long work takes: a chain of launches in a CUDA graph, or calls on a CPU; medians.

Each piece of work reads a weight of its own, and all of them together more than the last cache holds: a weight comes
from memory, as it does in a model. Weights so small that MAX_COPIES of them fit in a cache are the exception.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

Work = Callable[[], object]
REPEATS = 7
CPU_SECONDS = 0.5  # of repeating one measurement
CACHES = 6  # weights together are this many times as large as the last cache
MAX_COPIES = 40
L3_SIZE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
USUAL_L3_BYTES = 32 << 20


def time_chain(chain: Sequence[Work], device: torch.device) -> float:
    """Microseconds of one piece of a chain."""
    times = _graph_times(chain) if device.type == "cuda" else _cpu_times(chain)
    return statistics.median(times) / len(chain)


def num_copies(weight_bytes: float, device: torch.device) -> int:
    """Distinct weights that make caches useless."""
    return max(1, min(MAX_COPIES, -int(-CACHES * cache_bytes(device) // weight_bytes)))


def cache_bytes(device: torch.device) -> int:
    """Of the last cache before memory."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    if L3_SIZE.exists():
        return int(L3_SIZE.read_text().strip().removesuffix("K")) << 10
    return USUAL_L3_BYTES


def _graph_times(chain: Sequence[Work]) -> list[float]:
    """The first runs compile and allocate; the first replay loads the graph.

    Results live until the end: each is written to memory of its own, which the last cache does not hold either.
    """
    for _ in range(2):
        for work in chain:
            work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [work() for work in chain]
    graph.replay()
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    times = []
    for _ in range(REPEATS):
        before.record()
        graph.replay()
        after.record()
        torch.cuda.synchronize()
        times.append(before.elapsed_time(after) * 1e3)
    del results
    return times


def _cpu_times(chain: Sequence[Work]) -> list[float]:
    """At least two runs after the first, which warms up."""
    times: list[float] = []
    while len(times) < 3 or (len(times) <= REPEATS and sum(times) < CPU_SECONDS * 1e6):
        started = time.perf_counter()
        for work in chain:
            work()
        times.append((time.perf_counter() - started) * 1e6)
    return times[1:]
