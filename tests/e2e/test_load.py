"""Five hundred clients at once, who leave and who dawdle: everyone gets an answer, and nothing is left afterwards.

QUANTKIT_LOAD_SECONDS: how long they send (240). While a machine does other things, its server waits for a core: that is
told apart from the time that /health takes, and both are printed.
"""

import json
import os
import subprocess
import sys
import time
from collections import Counter

import httpx2
import pytest

from tests.command_line import ENVIRONMENT, ROOT
from tests.serving import held, is_idle, metric, serving, wait_until, waited

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
        looks = seconds + more_seconds
        wall, own = (sorted(each)[len(looks) * 99 // 100] for each in zip(*looks, strict=True))
        print(f"{counts}; /health p99 {wall:.4f} s, {own:.4f} s without waits for a core; {before} {after}")
        assert set(counts) == {"reads", "leaves", "left", "is slow", "429"}, (
            "others did not end as they should"
        )
        assert counts["429"] and counts["reads"] and counts["is slow"] and counts["left"]
        for now, then in zip(after, before, strict=True):
            assert now.num_bytes - then.num_bytes < MOST_NEW_BYTES
            assert now.num_files <= then.num_files
        assert wall < MOST_HEALTH_SECONDS


def load(server, http, seconds, *, seed):
    """Counts of how requests ended; of each look at /health its seconds, and those but for waits for a core.

    Afterwards there is no work.
    """
    arguments = [str(server.port), "demo", str(NUM_CLIENTS), str(seconds), str(seed)]
    command = [sys.executable, "-m", "tests.load_clients", *arguments]
    clients = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    looks = []
    both = (server.process.pid, os.getpid())
    while clients.poll() is None:
        started, waited_before = time.perf_counter(), sum(map(waited, both))
        assert http.get("/health").status_code == 200
        seconds_taken = time.perf_counter() - started
        looks.append((seconds_taken, seconds_taken - (sum(map(waited, both)) - waited_before)))
        if len(looks) % 20 == 0:
            assert metric(http, "vllm:num_requests_running") <= NUM_RUNNING
            assert metric(http, "vllm:num_requests_waiting") <= NUM_RUNNING + NUM_WAITING
        time.sleep(LOOK_SECONDS)
    counts = Counter(json.loads(clients.communicate()[0]))
    wait_until(lambda: is_idle(http))
    return counts, looks
