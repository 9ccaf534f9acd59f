"""Where a GPU's microseconds go in steps of an engine: kernels by what they do, and the time when none runs.

The profiler sees every kernel, inside of CUDA graphs too, and slows the host down: idle time is an upper bound.
"""

from collections import defaultdict
from typing import NamedTuple

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from quantkit.runtime.engine import Engine

# What a kernel's name says about its work; the first that matches.
KINDS = (
    ("attention", ("decode", "combine_kernel", "prefill_kernel", "widen")),
    ("linears", ("skinny", "tile", "stream", "wide", "gemm", "nvjet", "cutlass", "dequant", "grouped")),
    ("norms", ("norm",)),
    ("activation", ("activation", "encode_parts", "quantize_rows")),
    ("rope and append", ("rope",)),
    ("sampling", ("argmax", "best_of", "topk", "draw", "weigh", "list_kernel", "cut_kernel")),
    ("copies", ("Memcpy", "Memset")),
)
OTHER = "other"


class Timeline(NamedTuple):
    """Of a number of steps, microseconds of one. by_kind: time in kernels, overlapping ones counted once, for the kind
    that started first; idle: no kernel runs. num_kernels: of one step."""

    step_us: float
    by_kind: dict[str, float]
    idle_us: float
    num_kernels: float

    @property
    def idle_share(self) -> float:
        """Of a step."""
        return self.idle_us / self.step_us


def profile_steps(engine: Engine, num_steps: int, device: torch.device) -> Timeline:
    """The next steps of an engine on a GPU."""
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(num_steps):
            engine.step()
        torch.cuda.synchronize(device)
    kernels = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in profiler.events() or ()
        if event.device_type == DeviceType.CUDA
    )
    return summarize(kernels, num_steps)


def summarize(kernels: list[tuple[float, float, str]], num_steps: int) -> Timeline:
    """kernels: start, end, name, in the order of their starts."""
    by_kind: dict[str, float] = defaultdict(float)
    idle, until = 0.0, kernels[0][0]
    for start, end, name in kernels:
        idle += max(0.0, start - until)
        by_kind[kind_of(name)] += max(0.0, end - max(start, until))
        until = max(until, end)
    return Timeline(
        step_us=(until - kernels[0][0]) / num_steps,
        by_kind={kind: time / num_steps for kind, time in by_kind.items()},
        idle_us=idle / num_steps,
        num_kernels=len(kernels) / num_steps,
    )


def kind_of(name: str) -> str:
    """What a kernel does."""
    for kind, words in KINDS:
        if any(word in name for word in words):
            return kind
    return OTHER
