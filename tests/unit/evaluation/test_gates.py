"""Which candidate misses which gate, and by how much."""

import math

import pytest

from quantkit.errors import EvaluationError
from quantkit.evaluation.gates import Gates, check_gates, describe_failure, parse_percent
from tests.evaluation_reports import candidate, comparison


def test_only_the_gates_that_were_set_are_checked():
    assert check_gates(Gates(), candidate("a", tasks=(comparison("copy", 50.0),))) == ()
    results = check_gates(Gates(max_kl=0.2, min_top1=0.9), candidate("a"))
    assert [(result.candidate, result.gate, result.passed) for result in results] == [
        ("a", "max_kl", True),
        ("a", "min_top1", False),
    ]


@pytest.mark.parametrize("gates", [Gates(max_kl=0.1), Gates(max_ppl_increase=10.0), Gates(min_top1=0.8)])
def test_a_figure_at_its_limit_passes(gates):
    assert all(result.passed for result in check_gates(gates, candidate("a")))


def test_a_candidate_without_figures_meets_no_gate():
    (result,) = check_gates(Gates(max_kl=1e9), candidate("a", failure="NaN"))
    assert not result.passed and result.value is None
    assert describe_failure(result) == "a: --max-kl 1e+09 not met: no figures"


@pytest.mark.parametrize(
    ("gates", "line"),
    [
        (
            Gates(max_kl=0.07),
            "a: --max-kl 0.07 not met: KL 0.1 is 0.03 above the limit, "
            "which the 95 % interval (0.09 to 0.11) excludes",
        ),
        (
            Gates(max_ppl_increase=5),
            "a: --max-ppl-increase 5% not met: perplexity increase 10% is 5% above the limit",
        ),
        (Gates(min_top1=0.9), "a: --min-top1 0.9 not met: top-1 agreement 0.8 is 0.1 below the limit"),
    ],
)
def test_a_failure_says_by_how_much(gates, line):
    assert [describe_failure(result) for result in check_gates(gates, candidate("a"))] == [line]


def test_recovery_is_of_every_task_unless_a_task_has_its_own():
    tasks = (comparison("copy", 94.0, (90.0, 97.0)), comparison("needle", 80.0, (70.0, 88.0)))
    gates = Gates(min_recovery=95.0, tasks={"needle": 75.0})
    copy, needle = check_gates(gates, candidate("a", tasks=tasks))
    assert (copy.passed, copy.limit, needle.passed, needle.limit) == (False, 95.0, True, 75.0)
    assert describe_failure(copy) == (
        "a: --min-recovery 95% of copy (acc) not met: recovery 94% is 1% below the limit, "
        "which the 95 % interval (90 to 97) includes"
    )


@pytest.mark.parametrize(
    ("gates", "found", "why"),
    [
        (Gates(tasks={"copy": 90.0}), candidate("a", tasks=(comparison("needle", 100.0),)), "not asked"),
        (Gates(min_recovery=90.0), candidate("a"), "no figures"),
        (Gates(min_recovery=90.0), candidate("a", failure="NaN"), "no figures"),
        (Gates(min_recovery=90.0), candidate("a", tasks=(comparison("copy", math.nan),)), "scores 0"),
    ],
)
def test_a_recovery_that_is_not_known_is_not_met(gates, found, why):
    (result,) = check_gates(gates, found)
    assert not result.passed and why in describe_failure(result)


def test_what_is_given_wins_over_what_was_there():
    suite = Gates(max_kl=0.1, min_recovery=95.0, tasks={"copy": 90.0, "needle": 80.0})
    merged = suite.overridden_by(Gates(max_kl=0.2, min_top1=0.9, tasks={"needle": 50.0}))
    assert merged == Gates(max_kl=0.2, min_top1=0.9, min_recovery=95.0, tasks={"copy": 90.0, "needle": 50.0})


@pytest.mark.parametrize(("text", "value"), [("5%", 5.0), ("5", 5.0), (" 2.5 %", 2.5), ("-1%", -1.0)])
def test_percent(text, value):
    assert parse_percent(text, "--max-ppl-increase") == value


@pytest.mark.parametrize("text", ["", "five", "5%%", "%"])
def test_not_a_percentage(text):
    with pytest.raises(EvaluationError, match="--max-ppl-increase"):
        parse_percent(text, "--max-ppl-increase")


@pytest.mark.parametrize(
    ("limits", "option"),
    [
        ({"max_kl": -0.1}, "--max-kl"),
        ({"max_kl": float("nan")}, "--max-kl"),
        ({"max_kl": float("inf")}, "--max-kl"),
        ({"max_ppl_increase": float("nan")}, "--max-ppl-increase"),
        ({"min_top1": 90.0}, "--min-top1"),
        ({"min_top1": -0.1}, "--min-top1"),
        ({"min_recovery": -1.0}, "--min-recovery"),
        ({"tasks": {"probe_copying": float("nan")}}, "probe_copying"),
    ],
)
def test_limits_out_of_range_are_refused(limits, option):
    with pytest.raises(EvaluationError, match=option):
        Gates(**limits)
