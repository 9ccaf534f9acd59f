"""Five hundred clients at once, who leave and who dawdle: everyone gets an answer, and nothing is left afterwards.

QUANTKIT_LOAD_SECONDS: how long they send (240).
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter

import httpx2
import pytest

from tests.command_line import ENVIRONMENT, ROOT
from tests.serving import held, is_idle, metric, serving, wait_until

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]

SECONDS = float(os.environ.get("QUANTKIT_LOAD_SECONDS", "240"))
NUM_CLIENTS = 500
NUM_RUNNING, NUM_WAITING = 32, 224
MOST_NEW_BYTES = 32 << 20  # of a process, from the first third to the end
MOST_HEALTH_SECONDS = 0.1
LOOK_SECONDS = 0.05


def test_five_hundred_clients_who_leave_and_who_dawdle():
    options = (
        "--max-num-seqs",
        str(NUM_RUNNING),
        "--max-waiting",
        str(NUM_WAITING),
        "--max-model-len",
        "512",
    )
    with serving("demo", *options) as server, httpx2.Client(base_url=server.url, timeout=60) as http:
        pids = (server.process.pid, server.wait_until_ready())
        first, seconds = load(server, http, SECONDS / 3, seed=0)
        before = [held(pid) for pid in pids]
        second, more_seconds = load(server, http, SECONDS * 2 / 3, seed=1)
        after = [held(pid) for pid in pids]
        counts = first + second
        health = statistics.quantiles(seconds + more_seconds, n=1000, method="inclusive")
        print(f"{counts}; /health p50 {health[499]:.4f} s, p99 {health[989]:.4f} s; held {before} {after}")
        assert set(counts) == {"reads", "leaves", "left", "is slow", "429"}, (
            "others did not end as they should"
        )
        assert counts["429"] and counts["reads"] and counts["is slow"] and counts["left"]
        for now, then in zip(after, before, strict=True):
            assert now.num_bytes - then.num_bytes < MOST_NEW_BYTES
            assert now.num_files <= then.num_files
        assert health[989] < MOST_HEALTH_SECONDS


def load(server, http, seconds, *, seed):
    """Counts of how requests ended, and the seconds that each look at /health took; afterwards there is no work."""
    arguments = [str(server.port), "demo", str(NUM_CLIENTS), str(seconds), str(seed)]
    command = [sys.executable, "-m", "tests.load_clients", *arguments]
    clients = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    looks = []
    while clients.poll() is None:
        started = time.perf_counter()
        assert http.get("/health").status_code == 200
        looks.append(time.perf_counter() - started)
        if len(looks) % 20 == 0:
            assert metric(http, "vllm:num_requests_running") <= NUM_RUNNING
            assert metric(http, "vllm:num_requests_waiting") <= NUM_RUNNING + NUM_WAITING
        time.sleep(LOOK_SECONDS)
    counts = Counter(json.loads(clients.communicate()[0]))
    wait_until(lambda: is_idle(http))
    return counts, looks
