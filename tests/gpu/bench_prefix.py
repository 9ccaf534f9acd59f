"""Requests that share a prompt of 2048 tokens: what the first waits for, and what the others do. Needs a GPU.

    PYTHONPATH=.:kernels python tests/gpu/bench_prefix.py CHECKPOINT[,kv_cache_dtype] …        made by make_8b.py

64 requests, each with 64 tokens of its own, greedy, 32 tokens out: the first alone, then all others at once; then all
at once to an empty cache, and without a cache. Tokens of KV that fit are of a whole GPU.
"""

import statistics
import sys
from pathlib import Path

import torch

from quantkit.bench.generation import Arrivals, random_prompts, run_requests
from quantkit.formats.checkpoint import open_checkpoint
from quantkit.runtime.settings import EngineSettings
from quantkit.runtime.start import Started, start_engine

COUNT, SHARED, OWN, NEW = 64, 2048, 64, 32


def start(folder: str, kv_cache_dtype: str, *, prefix_caching: bool) -> Started:
    """Compiled and captured, with a cache that holds nothing of what will be asked."""
    settings = EngineSettings(
        device="cuda",
        max_model_len=4096,
        prefix_caching=prefix_caching,
        kv_cache_dtype=kv_cache_dtype or "auto",
    )
    started = start_engine(open_checkpoint(Path(folder)), settings)
    for seed in (1, 2):
        run_requests(started.engine, prompts(started, seed)[:1], NEW)
        run_requests(started.engine, prompts(started, seed)[1:], NEW)
    return started


def prompts(started: Started, seed: int) -> list[list[int]]:
    """The same beginning, other ends."""
    vocab_size = started.model.spec.vocab_size
    (shared,) = random_prompts(1, SHARED, vocab_size, seed)
    return [shared + own for own in random_prompts(COUNT, OWN, vocab_size, seed + 1000)]


def ttfts(requests: list[Arrivals]) -> str:
    """Median and longest."""
    times = [request.ttft * 1e3 for request in requests]
    return f"TTFT p50 {statistics.median(times):.1f}, longest {max(times):.1f} ms"


def measure(name: str) -> None:
    """One checkpoint, with a cache and without."""
    folder, _, kv = name.partition(",")
    for prefix_caching in (True, False):
        started = start(folder, kv, prefix_caching=prefix_caching)
        engine = started.engine
        print(
            f"== {Path(folder).name} {kv}, caching {prefix_caching}: {started.num_kv_tokens:,} tokens of KV fit"
        )
        before = engine.scheduler.stats
        asked = prompts(started, 3)
        first = run_requests(engine, asked[:1], NEW)
        others = run_requests(engine, asked[1:], NEW)
        after = engine.scheduler.stats
        hits = after.num_prefix_hits - before.num_prefix_hits
        queries = after.num_prefix_queries - before.num_prefix_queries
        share = f"{hits / queries:.1%} of prompt tokens found" if queries else ""
        print(f"first {ttfts(first)}; {COUNT - 1} others at once {ttfts(others)}; {share}")
        one = [run_requests(engine, [prompt], NEW)[0] for prompt in prompts(started, 3)[1:9]]
        print(f"one follower at a time {ttfts(one)}")
        print(f"all at once, cold: {ttfts(run_requests(engine, prompts(started, 4), NEW))}", flush=True)
        del started, engine


def main() -> None:
    """A few lines for each checkpoint."""
    print(torch.cuda.get_device_name())
    for name in sys.argv[1:]:
        measure(name)


if __name__ == "__main__":
    main()
