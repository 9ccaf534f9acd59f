"""Metrics are what happened, under names that dashboards ask for."""

import json
import re
import time
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from quantkit.server.generation import Generation
from quantkit.server.messages import Choice, Delta, Ready, Stats
from quantkit.server.metrics import Metrics

DASHBOARD = Path(__file__).parents[3] / "docs" / "grafana-dashboard.json"


def samples(metrics):
    families = text_string_to_metric_families(metrics.render().decode())
    return {sample.name: sample for family in families for sample in family.samples}


def run_one(metrics):
    """A request with one answer of three tokens, as it is counted."""
    generation = Generation(0, [10], arrival=0.0, num_answers=1, is_streamed=True)
    now = time.monotonic()
    metrics.began(generation.begin("0-0", now - 1))
    for place, finish in enumerate((None, None, "stop")):
        choice = Choice(0, "x", 1, finish, None, None)
        seconds = generation.put(Delta("0-0", [choice], finish is not None, 0, None), now + place)
        metrics.generated(choice.num_tokens)
        if seconds is None:
            metrics.got_first_token(generation.times)
        else:
            metrics.got_token(seconds)
    metrics.ended(generation, generation.times.last_token + 1)
    return generation


def test_a_request_is_counted_once():
    metrics = Metrics("m")
    arrival, begun, first, last = run_one(metrics).times
    found = samples(metrics)
    assert found["vllm:prompt_tokens_total"].value == 10
    assert found["vllm:generation_tokens_total"].value == 3
    assert found["vllm:request_success_total"].labels == {"model_name": "m", "finished_reason": "stop"}
    assert found["vllm:time_to_first_token_seconds_sum"].value == first - arrival
    assert found["vllm:inter_token_latency_seconds_count"].value == 2
    assert abs(found["vllm:inter_token_latency_seconds_sum"].value - (last - first)) < 1e-9
    assert found["vllm:request_queue_time_seconds_sum"].value == begun - arrival


def test_the_engine_says_how_it_is():
    metrics = Metrics("m")
    metrics.stepped(Stats(3, 2, 0.25, 100, 40, 1))
    metrics.ready(Ready(1, 260, 64, 4, 3200, 16, "cpu", {}))
    found = {name: sample.value for name, sample in samples(metrics).items()}
    assert (found["vllm:num_requests_waiting"], found["vllm:num_requests_running"]) == (3, 2)
    assert found["vllm:kv_cache_usage_perc"] == 0.25
    assert (found["vllm:prefix_cache_queries_total"], found["vllm:prefix_cache_hits_total"]) == (100, 40)
    assert samples(metrics)["vllm:cache_config_info"].labels["num_gpu_blocks"] == "200"


def test_the_dashboard_asks_for_what_there_is():
    metrics = Metrics("m")
    run_one(metrics)
    metrics.responded("/health", 200)
    there = set(samples(metrics))
    asked = set(re.findall(r"(?:vllm|quantkit):\w+", DASHBOARD.read_text()))
    assert asked
    assert asked <= there
    assert len({panel["id"] for panel in json.loads(DASHBOARD.read_text())["panels"]}) >= 8
