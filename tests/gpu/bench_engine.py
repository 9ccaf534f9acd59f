"""The engine's speed on checkpoints of the Llama-3.1-8B shape, the same requests for each. Needs a GPU.

    PYTHONPATH=.:kernels python tests/gpu/bench_engine.py CHECKPOINT[,kv_cache_dtype] …        made by make_8b.py

Prompts of random tokens, greedy answers, no prefix is cached. Decode at batch 1: 128 tokens in, 257 out, tokens a
second after the first. n requests of 512 in, 128 out, all at once: tokens a second after the last first token;
n · 127 / (t(128) − t(1)), t(m) being the seconds of a run of m tokens out; tokens a second of the whole run.
"""

import sys
import time
from pathlib import Path

import torch

from quantkit.bench.ceilings import measure_read
from quantkit.bench.engine import decode_timeline, fastest_run, step_weight_bytes
from quantkit.bench.generation import Speed
from quantkit.bench.prompts import random_prompts
from quantkit.formats.checkpoint import open_checkpoint
from quantkit.runtime.settings import EngineSettings
from quantkit.runtime.start import Started, start_engine

MANY = (8, 32, 64, 256)


def best(started: Started, count: int, num_in: int, num_out: int, repeats: int = 2) -> Speed:
    """The fastest of some runs of random prompts."""
    prompts = random_prompts(count, num_in, started.model.spec.vocab_size)
    return fastest_run(started, prompts, num_out, repeats, EngineSettings().max_num_seqs)


def measure(name: str, read_rate: float) -> None:
    """All rows of one checkpoint."""
    folder, _, kv = name.partition(",")
    checkpoint = open_checkpoint(Path(folder))
    settings = EngineSettings(
        device="cuda", max_model_len=4096, prefix_caching=False, kv_cache_dtype=kv or "auto"
    )
    started = start_engine(checkpoint, settings)
    model = started.model
    parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in started.seconds.items())
    say(f"== {Path(folder).name} {kv}: {sum(started.seconds.values()):.1f} s to ready ({parts})")
    one = best(started, 1, 128, 257)
    assert one.tpot_ms is not None, "257 tokens"
    share = step_weight_bytes(checkpoint, model) / (one.tpot_ms[50] / 1e3) / read_rate
    pace = 1e3 / one.tpot_ms[50]
    say(
        f"batch 1: {pace:.1f} tok/s, TPOT {one.tpot_ms[50]:.3f} ms, {share:.0%} of {read_rate / 1e12:.2f} TB/s"
    )
    for num_in in (512, 2048):
        say(f"TTFT {num_in}: {best(started, 1, num_in, 2, 5).ttft_ms[50]:.2f} ms")
    for count in MANY:
        found, first = best(started, count, 512, 128), best(started, count, 512, 1)
        after = count * 127 / (found.seconds - first.seconds)
        rates = f"decode {found.decode_rate:.0f}, {after:.0f}, all {found.output_rate:.0f} tok/s"
        say(f"{count} requests: {rates}, TTFT p50 {found.ttft_ms[50]:.0f} ms")
    for count in (1, 64):
        line = decode_timeline(started, random_prompts(count, 512, model.spec.vocab_size))
        assert line is not None, "4096 tokens have room for it"
        kinds = sorted(line.by_kind.items(), key=lambda item: -item[1])
        parts = ", ".join(f"{kind} {us:.0f}" for kind, us in kinds)
        say(f"step of {count}, us: {line.step_us:.0f}, {line.num_kernels:.0f} kernels: {parts}")
        say(f"idle: {line.idle_share:.1%}")


def say(line: str) -> None:
    print(line, flush=True)


def main() -> None:
    say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    read_rate = measure_read(torch.device("cuda", 0))
    torch.cuda.empty_cache()
    for name in sys.argv[1:]:
        measure(name, read_rate)


if __name__ == "__main__":
    main()
