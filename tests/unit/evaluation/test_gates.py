"""Which candidate misses which gate, and by how much."""

import pytest

from quantkit.errors import EvaluationError
from quantkit.evaluation.gates import Gates, check_gates, describe_failure, parse_percent
from quantkit.evaluation.report import CandidateReport, Damage


def candidate(path, failure=None, **figures):
    known = {
        "ppl": 11.0,
        "ppl_increase": 10.0,
        "kl_mean": 0.1,
        "kl_ci": (0.09, 0.11),
        "kl_median": 0.05,
        "kl_p99": 1.0,
        "kl_noise_floor": 0.001,
        "top1": 0.8,
    }
    damage = None if failure else Damage(**(known | figures))
    return CandidateReport(
        kind="16-bit",
        backend="quantkit",
        path=path,
        dtype="float32",
        kernels="torch",
        bits_per_weight=4.25,
        bytes=100,
        damage=damage,
        failure=failure,
    )


def test_only_the_gates_that_were_set_are_checked():
    assert check_gates(Gates(), (candidate("a"),)) == ()
    results = check_gates(Gates(max_kl=0.2, min_top1=0.9), (candidate("a"), candidate("b", top1=0.95)))
    assert [(result.candidate, result.gate, result.passed) for result in results] == [
        ("a", "max_kl", True),
        ("a", "min_top1", False),
        ("b", "max_kl", True),
        ("b", "min_top1", True),
    ]


@pytest.mark.parametrize("gates", [Gates(max_kl=0.1), Gates(max_ppl_increase=10.0), Gates(min_top1=0.8)])
def test_a_figure_at_its_limit_passes(gates):
    assert all(result.passed for result in check_gates(gates, (candidate("a"),)))


def test_a_candidate_without_figures_meets_no_gate():
    (result,) = check_gates(Gates(max_kl=1e9), (candidate("a", failure="NaN"),))
    assert not result.passed and result.value is None
    assert describe_failure(result) == "a: --max-kl 1e+09 not met: no figures"


@pytest.mark.parametrize(
    ("gates", "line"),
    [
        (Gates(max_kl=0.07), "a: --max-kl 0.07 not met: KL 0.1 is 0.03 above the limit"),
        (
            Gates(max_ppl_increase=5),
            "a: --max-ppl-increase 5% not met: perplexity increase 10% is 5% above the limit",
        ),
        (Gates(min_top1=0.9), "a: --min-top1 0.9 not met: top-1 agreement 0.8 is 0.1 below the limit"),
    ],
)
def test_a_failure_says_by_how_much(gates, line):
    assert [describe_failure(result) for result in check_gates(gates, (candidate("a"),))] == [line]


@pytest.mark.parametrize(("text", "value"), [("5%", 5.0), ("5", 5.0), (" 2.5 %", 2.5), ("-1%", -1.0)])
def test_percent(text, value):
    assert parse_percent(text) == value


@pytest.mark.parametrize("text", ["", "five", "5%%", "%"])
def test_not_a_percentage(text):
    with pytest.raises(EvaluationError, match="--max-ppl-increase"):
        parse_percent(text)


@pytest.mark.parametrize(
    ("limits", "option"),
    [
        ({"max_kl": -0.1}, "--max-kl"),
        ({"max_kl": float("nan")}, "--max-kl"),
        ({"max_kl": float("inf")}, "--max-kl"),
        ({"max_ppl_increase": float("nan")}, "--max-ppl-increase"),
        ({"min_top1": 90.0}, "--min-top1"),
        ({"min_top1": -0.1}, "--min-top1"),
    ],
)
def test_limits_out_of_range_are_refused(limits, option):
    with pytest.raises(EvaluationError, match=option):
        Gates(**limits)
