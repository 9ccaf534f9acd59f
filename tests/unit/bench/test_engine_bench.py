"""The arithmetic of arrivals, timelines and costs, and the verbs on a tiny model."""

import json
import math

import pytest

from quantkit.bench.arrivals import Arrivals
from quantkit.bench.cost import Prices, cost_of
from quantkit.bench.generation import speed_of
from quantkit.bench.timeline import OTHER, kind_of, summarize
from quantkit.cli.main import run
from tests.tiny_llama import write_tiny_llama


def test_times_between_tokens_and_rates_by_hand():
    requests = [Arrivals(10, 3, (1.0, 2.0, 3.0)), Arrivals(20, 3, (2.0, 4.0, 6.0))]
    speed = speed_of(requests, max_num_seqs=2)
    assert (speed.num_prompt_tokens, speed.num_output_tokens, speed.seconds) == (30, 6, 6.0)
    assert speed.ttft_ms[50] == pytest.approx(1500)
    assert speed.tpot_ms[50] == pytest.approx(1500)
    assert speed.itl_ms[99] == pytest.approx(2000)
    assert speed.decode_rate == pytest.approx(
        3 / 4
    )  # three tokens come in the four seconds after the last first one
    assert speed.output_rate == pytest.approx(1)
    assert speed.total_rate == pytest.approx(6)


def test_one_token_has_no_time_between_and_waves_have_no_decode_rate():
    speed = speed_of([Arrivals(5, 1, (1.0,))], max_num_seqs=1)
    assert (speed.tpot_ms, speed.itl_ms, speed.decode_rate) == (None, None, None)
    waves = speed_of([Arrivals(5, 2, (1.0, 2.0)), Arrivals(5, 2, (3.0, 4.0))], max_num_seqs=1)
    assert waves.decode_rate is None
    assert waves.output_rate == 1


def test_a_timeline_counts_overlaps_once_and_gaps_as_idle():
    kernels = [(0.0, 4.0, "skinny"), (3.0, 6.0, "decode_kernel"), (8.0, 9.0, "norm_kernel"), (9.0, 10.0, "?")]
    line = summarize(kernels, num_steps=2)
    assert line.step_us == 5
    assert line.by_kind == {"linears": 2, "attention": 1, "norms": 0.5, OTHER: 0.5}
    assert line.idle_us == 1
    assert line.idle_share == pytest.approx(0.2)
    assert line.num_kernels == 2


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("decode", "attention"),
        ("widen_kernel", "attention"),
        ("wide_codes", "linears"),
        ("byte_stream", "linears"),
        ("nvjet_tst_64x8", "linears"),
        ("encode_parts_kernel", "activation"),
        ("rope_append_kernel", "rope and append"),
        ("best_of_parts_kernel", "sampling"),
        ("vectorized_gather_kernel", OTHER),
    ],
)
def test_kernels_are_known_by_their_names(name, kind):
    assert kind_of(name) == kind


def test_build_or_buy_by_hand():
    cost = cost_of(Prices(3.6, 1.0, 2.0), num_prompt_tokens=500, num_output_tokens=250, request_rate=10)
    assert cost.own_request == pytest.approx(1e-4)
    assert cost.api_request == pytest.approx(1e-3)
    assert cost.tokens_per_unit == pytest.approx(7.5e6)
    assert cost.break_even_load == pytest.approx(0.1)
    assert cost.break_even_requests == pytest.approx(3.6 * 730 / 1e-3)
    dear = cost_of(Prices(3.6, 1.0, 2.0), num_prompt_tokens=500, num_output_tokens=250, request_rate=0.9)
    assert (dear.break_even_requests, dear.break_even_load) == (None, None)


@pytest.fixture
def tiny(tmp_path):
    return str(write_tiny_llama(tmp_path / "tiny"))


def test_latency_and_throughput_report_what_they_ran(tiny, capfd):
    small = ["--prompt-tokens", "9", "--output-tokens", "4", "--repeats", "1", "--device", "cpu", "--json"]
    assert run(["bench", "latency", tiny, *small]) == 0
    one = json.loads(capfd.readouterr().out)
    assert one["speed"]["num_output_tokens"] == 4
    assert 0 < one["bandwidth"] < 2
    assert run(["bench", "throughput", tiny, "--requests", "3", "--max-num-seqs", "2", *small]) == 0
    many = json.loads(capfd.readouterr().out)
    assert many["speed"]["num_output_tokens"] == 12
    assert (many["speed"]["decode_rate"], many["bandwidth"]) == (None, None)


def test_the_table_has_every_time(tiny, capfd):
    assert (
        run(["bench", "latency", tiny, "--prompt-tokens", "9", "--output-tokens", "4", "--device", "cpu"])
        == 0
    )
    out = capfd.readouterr().out
    assert all(word in out for word in ("TTFT", "TPOT", "ITL", "tok/s"))


def test_given_prompts_are_taken_in_turn(tiny, tmp_path, capfd):
    file = tmp_path / "prompts.txt"
    file.write_text("The dog\n\nThe quick brown fox\n")
    line = [
        "bench",
        "throughput",
        tiny,
        "--requests",
        "4",
        "--output-tokens",
        "2",
        "--repeats",
        "1",
        "--json",
    ]
    assert run([*line, "--prompts", str(file)]) == 0
    assert json.loads(capfd.readouterr().out)["speed"]["num_requests"] == 4
    assert run([*line, "--prompts", str(tmp_path / "none.txt")]) == 2
    assert "cannot be read" in capfd.readouterr().err


def test_cost_compares_with_an_api(tiny, capfd):
    line = [
        "bench",
        "cost",
        tiny,
        "--requests",
        "2",
        "--prompt-tokens",
        "9",
        "--output-tokens",
        "2",
        "--json",
    ]
    prices = ["--gpu-price", "2", "--api-price-in", "0.1", "--api-price-out", "0.4"]
    assert run([*line, *prices]) == 0
    cost = json.loads(capfd.readouterr().out)["cost"]
    assert cost["own_request"] > 0
    assert math.isfinite(cost["tokens_per_unit"])
    assert run([*line, "--gpu-price", "0", *prices[2:]]) == 2
    assert "prices above 0" in capfd.readouterr().err


def test_what_does_not_fit_is_refused(tiny, capfd):
    assert run(["bench", "latency", tiny, "--prompt-tokens", "120", "--output-tokens", "20"]) == 2
    assert "fewer output tokens" in capfd.readouterr().err
