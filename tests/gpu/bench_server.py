"""A server on a GPU beside the same engine without one: what HTTP costs, and how soon a first token comes. Needs a GPU.

    PYTHONPATH=.:kernels python tests/gpu/bench_server.py CHECKPOINT       made by make_8b.py, or any

Both are loaded at once and take turns: 192 requests of 512 random tokens in and 128 out, 64 computed at a time, offline
and through HTTP, three times each. Then once more through HTTP with all 192 sent at once, as offline: what is missing
to the closed load is the time in which a place is empty. Then 1024 tokens in, 128 out, at rising rates; no prompt is
ever sent twice. Prints one table, in less than three minutes; the server logs to server.log. A checkpoint without a
tokenizer gets one whose tokens are words of their own.
"""

import json
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from quantkit.bench.generation import run_requests, speed_of
from quantkit.bench.prompts import random_prompts
from quantkit.formats.checkpoint import open_checkpoint
from quantkit.runtime.settings import EngineSettings
from quantkit.runtime.start import Started, start_engine

QUANTKIT = [sys.executable, "-m", "quantkit"]
NUM_REQUESTS, NUM_ROWS, NUM_IN, NUM_OUT, ROUNDS = 192, 64, 512, 128, 3
RATES, RATE_SECONDS, RATE_IN = (1, 2, 4, 8), 20, 1024
VOCAB_SIZE = 128_000
MEMORY = 0.4  # of the GPU, for either; the fraction of the one that comes second counts what is taken


def add_tokenizer(folder: Path) -> None:
    """As many tokens as the model has: bytes, then words."""
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"w{number}" for number in range(len(letters), vocab_size)]
    tokenizer = Tokenizer(
        models.BPE(vocab={word: number for number, word in enumerate(letters + words)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def quantkit(*arguments: str) -> dict:
    """What a verb prints as JSON."""
    result = subprocess.run([*QUANTKIT, *arguments, "--json"], capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{arguments}: {result.returncode}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}")
    return json.loads(result.stdout)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_ready(url: str, server: subprocess.Popen) -> float:
    """Seconds."""
    started = time.perf_counter()
    while server.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health"):
                return time.perf_counter() - started
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.05)
    sys.exit(f"the server ended: {server.returncode}")


def offline_rate(started: Started, seed: int) -> float:
    """Tokens out a second."""
    prompts = random_prompts(NUM_REQUESTS, NUM_IN, VOCAB_SIZE, seed)
    return speed_of(run_requests(started.engine, prompts, NUM_OUT), NUM_ROWS).output_rate


def served(url: str, *load: str, prompt_tokens: int, requests: int, seed: int) -> dict:
    """A report of `bench serve`."""
    size = [
        "--prompt-tokens",
        str(prompt_tokens),
        "--output-tokens",
        str(NUM_OUT),
        "--requests",
        str(requests),
    ]
    tokens = ["--vocab-size", str(VOCAB_SIZE), "--seed", str(seed)]
    report = quantkit("bench", "serve", "--url", url, *size, *tokens, *load)
    assert report["num_answered"] == requests, report["errors"]
    return report


def compare(started: Started, url: str) -> None:
    """Rows about tokens a second."""

    def through_http(concurrency: int, seed: int) -> dict:
        load = ("--concurrency", str(concurrency))
        return served(url, *load, prompt_tokens=NUM_IN, requests=NUM_REQUESTS, seed=seed)

    offline_rate(started, seed=0)  # both capture the graphs that they need
    through_http(NUM_ROWS, seed=1)
    offline, closed, busy = [], [], []
    for turn in range(ROUNDS):
        offline.append(offline_rate(started, seed=10 + turn))
        report = through_http(NUM_ROWS, seed=20 + turn)
        closed.append(report["output_rate"])
        busy.append(report["busy"])
    at_once = through_http(NUM_REQUESTS, seed=30)["output_rate"]
    reference = statistics.median(offline)
    for name, rates in (
        ("offline", offline),
        (f"HTTP, {NUM_ROWS} at a time", closed),
        ("HTTP, all", [at_once]),
    ):
        found = statistics.median(rates)
        each = ", ".join(f"{rate:.0f}" for rate in rates)
        print(f"| {name} | {found:.0f} tok/s ({each}) | {found / reference:.3f} of offline |", flush=True)
    print(f"| generator | {max(busy):.0%} of a core | |", flush=True)


def rise(url: str) -> None:
    """Rows about the time to the first token."""
    for rate in RATES:
        load = ("--rate", str(rate))
        report = served(url, *load, prompt_tokens=RATE_IN, requests=rate * RATE_SECONDS, seed=100 + rate)
        ttft, tpot = report["ttft_ms"], report["tpot_ms"]
        times = f"TTFT p50 {ttft['50']:.1f} ms, p99 {ttft['99']:.1f} ms | TPOT p50 {tpot['50']:.1f} ms"
        print(f"| {rate} requests/s of {RATE_IN} tokens | {times} |", flush=True)


def main() -> None:
    """The table."""
    folder = Path(sys.argv[1])
    if not (folder / "tokenizer.json").exists():
        add_tokenizer(folder)
    limits = {"max_num_seqs": NUM_ROWS, "max_model_len": 4096, "gpu_memory_fraction": MEMORY}
    options = [each for name, value in limits.items() for each in (f"--{name.replace('_', '-')}", str(value))]
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    began = time.perf_counter()
    with Path("server.log").open("w") as log:
        command = [*QUANTKIT, "serve", str(folder), "--port", str(port), *options]
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        print("| | | |\n|---|---|---|")
        print(f"| start to ready | {wait_until_ready(url, server):.1f} s | |", flush=True)
        limits["gpu_memory_fraction"] = 2 * MEMORY + 0.03
        started = start_engine(open_checkpoint(folder), EngineSettings(**limits))
        compare(started, url)
        rise(url)
    finally:
        server.terminate()
        print(f"| all | {time.perf_counter() - began:.0f} s | server ended with {server.wait(60)} |")


if __name__ == "__main__":
    main()
