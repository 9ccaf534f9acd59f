"""A server on a GPU under load, beside the same engine without a server. Needs a GPU.

    PYTHONPATH=.:kernels python tests/gpu/bench_server.py CHECKPOINT       made by make_8b.py, or any

256 requests of 512 random tokens in and 128 out, 64 at a time: offline, then through HTTP. Then 1024 tokens in, 128
out, at rising rates. The server logs to server.log. A checkpoint without a tokenizer gets one whose tokens are words
of their own.
"""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

QUANTKIT = [sys.executable, "-m", "quantkit"]
RATES = (1, 4, 8, 16, 32)
SECONDS = 6  # of each rate


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


def show(load: str, report: dict) -> None:
    """A line."""
    times = ", ".join(
        f"{name} p50 {report[f'{name}_ms']['50']:.1f} p99 {report[f'{name}_ms']['99']:.1f}"
        for name in ("ttft", "tpot", "e2e")
    )
    counts = f"{report['num_answered']} of {report['num_requests']} answered, {report['output_rate']:.0f} tok/s out"
    print(f"{load}: {counts}; ms: {times}; generator {report['busy']:.0%} of a core", flush=True)


def main() -> None:
    """A line for each load."""
    folder = Path(sys.argv[1])
    if not (folder / "tokenizer.json").exists():
        add_tokenizer(folder)
    size = ["--prompt-tokens", "512", "--output-tokens", "128", "--requests", "256"]
    limits = ["--max-num-seqs", "64", "--max-model-len", "4096"]
    offline = quantkit("bench", "throughput", str(folder), *size, *limits)
    print(f"offline: {offline['speed']['output_rate']:.0f} tok/s out", flush=True)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with Path("server.log").open("w") as log:
        server = subprocess.Popen(
            [*QUANTKIT, "serve", str(folder), "--port", str(port), *limits], stdout=log, stderr=log
        )
    try:
        print(f"ready after {wait_until_ready(url, server):.1f} s", flush=True)
        load = ["bench", "serve", "--url", url, "--vocab-size", "128000"]
        for seed in ("1", "2", "3"):  # the first captures the graphs that it needs
            report = quantkit(*load, *size, "--concurrency", "64", "--seed", seed)
            show("64 at a time", report)
        for rate in RATES:
            count = ["--rate", str(rate), "--requests", str(rate * SECONDS), "--seed", str(100 + rate)]
            show(f"{rate}/s", quantkit(*load, "--prompt-tokens", "1024", "--output-tokens", "128", *count))
    finally:
        server.terminate()
        print(f"server ended with {server.wait(60)}")


if __name__ == "__main__":
    main()
