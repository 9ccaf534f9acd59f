"""Times of products of hundreds to thousands of rows, in turn with bf16: clocks drift.

    PYTHONPATH=.:kernels python tests/gpu/bench_wide.py 16:int4 16:fp8 16:int8 int8:int4 fp8:int4 [rows …]

inputs:weights. The four products of a Llama-3.1-8B layer, INT4 in groups of 128 or 8 bits with a scale per row, random
codes and scales; a graph over distinct weights. us.
"""

import statistics
import sys

import torch

from quantkit_kernels import w4a8
from quantkit_kernels.wide import KINDS, wide
from tests.gpu.bench_tile import CACHE_BYTES, SHAPES, operands

TILINGS = [kind.tiling for kind in KINDS]
CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def graph_of(work):
    work()
    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    return graph


def microseconds(graphs, rounds=5):
    """Medians, everything in turn: clocks drift."""
    times = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            graph.replay()
            a.record()
            graph.replay()
            graph.replay()
            b.record()
            torch.cuda.synchronize()
            times[name].append(a.elapsed_time(b) * 1e3 / 2)
    return {name: statistics.median(t) for name, t in times.items()}


def chain(multiply, weights):
    return graph_of(lambda: [multiply(weight) for weight in weights])


def graphs_of(kind, m, k, weights, dense):
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    graphs = {"bf16": chain(lambda w: x @ w.T, dense)}
    if kind in CODES:
        codes, scale = (x * 30).to(CODES[kind]), torch.rand(m, 1, device="cuda")
        more = {"x_scale": scale, "out_dtype": torch.bfloat16}
        for route in w4a8.ROUTES[1:]:
            graphs[route.name] = chain(lambda w, run=route.run: run(codes, w, **more), weights)
        return graphs
    for t in TILINGS:
        graphs["/".join(map(str, t))] = chain(lambda w, t=t: wide(x, w, tiling=t, dependent=True), weights)
    graphs["wide"] = chain(lambda w: wide(x, w, dependent=True), weights)
    return graphs


def measure(kind, weight_kind, rows):
    total = {}
    for name, (n, k) in SHAPES.items():
        count = max(1, min(4, CACHE_BYTES // (2 * n * k)))
        weights = operands(n, k, weight_kind, 2 * count)[:count]
        dense = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
        for m in rows:
            times = microseconds(graphs_of(kind, m, k, weights, dense))
            words = "  ".join(f"{key} {time / count:.1f}" for key, time in times.items())
            print(f"{name:8} M={m:5} {words}", flush=True)
            for key, time in times.items():
                total[m, key] = total.get((m, key), 0) + time / count
    for m in rows:
        words = "  ".join(f"{key} {time:.1f}" for (of, key), time in total.items() if of == m)
        print(f"{kind} on {weight_kind} layer M={m:5} {words}", flush=True)


def main():
    rows = [int(a) for a in sys.argv[1:] if a.isdigit()] or [512, 1024, 2048, 4096]
    print(torch.cuda.get_device_name())
    for pair in (a for a in sys.argv[1:] if not a.isdigit()):
        kind, weight_kind = pair.split(":")
        measure(kind, weight_kind, rows)


if __name__ == "__main__":
    with torch.no_grad():
        main()
