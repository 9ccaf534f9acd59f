"""Intervals and tests: against references, their rate of false alarms, and whether they see what was planted."""

import math

import numpy as np
import pytest
from scipy.stats import binom, norm

from quantkit.evaluation.tasks import statistics
from quantkit.evaluation.tasks.statistics import BOOTSTRAP, MCNEMAR, compare, mcnemar

COMPARISONS, ALARM = 200, 0.05
# Of 200 comparisons of a test that holds its rate, more than these give an alarm once in a thousand runs of this test.
MOST_ALARMS = int(binom.ppf(0.999, COMPARISONS, ALARM))


@pytest.fixture(autouse=True)
def fewer_resamples(monkeypatch):
    """Enough to tell 5 %."""
    monkeypatch.setattr(statistics, "RESAMPLES", 400)
    monkeypatch.setattr(statistics, "SLOW_RESAMPLES", 200)


def mean(values):
    return sum(values) / len(values)


def weighted_perplexity(pairs):
    return math.exp(-sum(value for value, _ in pairs) / sum(weight for _, weight in pairs))


def alarms(draw, aggregate=mean, **options):
    """Of so many comparisons of draw(rng) -> two lists of values."""
    rng = np.random.default_rng(7)
    found = [
        compare(*draw(rng), aggregate, higher_is_better=True, seed=number, **options)
        for number in range(COMPARISONS)
    ]
    return sum(one.p_value < ALARM for one in found)


def right_or_wrong(rng, count=300, lost=0.06, won=0.06):
    """Answers of which some change, as noise changes them: as often to wrong as to right, unless it is said."""
    before = (rng.random(count) < 0.5).astype(int)
    changed = rng.random(count) < np.where(before == 1, 2 * lost, 2 * won)
    return before.tolist(), np.where(changed, 1 - before, before).tolist()


def real_values(rng, count=100, shift=0.0):
    before = rng.gamma(2.0, size=count)
    return before.tolist(), (before + shift + 0.1 * rng.standard_t(4, size=count)).tolist()


def log_likelihoods(rng, count=60, shift=0.0):
    weights = rng.integers(5, 80, size=count)
    before = -weights * rng.gamma(9.0, 1 / 3, size=count)
    after = before + weights * (shift + 0.05 * rng.standard_normal(count))
    return [list(zip(values.tolist(), weights.tolist(), strict=True)) for values in (before, after)]


@pytest.mark.parametrize("draw", [right_or_wrong, real_values])
def test_false_alarms_are_no_more_than_the_rate(draw):
    assert alarms(draw) <= MOST_ALARMS


def test_false_alarms_of_scores_that_are_no_means():
    assert alarms(log_likelihoods, weighted_perplexity) <= MOST_ALARMS


@pytest.mark.parametrize(
    ("draw", "aggregate"),
    [
        (lambda rng: right_or_wrong(rng, lost=0.12, won=0.03), mean),
        (lambda rng: real_values(rng, shift=-0.06), mean),
    ],
)
def test_a_true_loss_is_seen(draw, aggregate):
    assert alarms(draw, aggregate) > 0.9 * COMPARISONS


def test_mcnemar_is_the_binomial_test_of_what_changed():
    before = [1] * 9 + [0] * 2 + [1] * 30
    after = [0] * 9 + [1] * 2 + [1] * 30
    assert mcnemar(before, after) == pytest.approx(2 * binom.cdf(2, 11, 0.5))
    assert mcnemar(before, before) == 1.0
    assert mcnemar([1, 0], [0, 1]) == 1.0
    assert compare(before, after, mean, higher_is_better=True).test == MCNEMAR


def test_the_bootstrap_approaches_the_test_of_a_mean():
    rng = np.random.default_rng(0)
    before = rng.standard_normal(400)
    after = before + rng.standard_normal(400) * 0.1 + 0.01
    found = compare(before.tolist(), after.tolist(), mean, higher_is_better=True)
    difference = after - before
    z = abs(difference.mean()) / (difference.std(ddof=1) / math.sqrt(400))
    assert found.test == BOOTSTRAP and found.p_value == pytest.approx(2 * norm.sf(z), abs=0.02)
    half = 1.96 * before.std(ddof=1) / math.sqrt(400)
    assert found.reference_ci == pytest.approx((before.mean() - half, before.mean() + half), abs=0.02)


def test_recovery_is_of_what_is_better():
    up, down = [3.0, 5.0, 4.0], [1.5, 2.5, 2.0]
    higher = compare(up, down, mean, higher_is_better=True)
    lower = compare(up, down, mean, higher_is_better=False)
    assert (higher.recovery, lower.recovery) == pytest.approx((50, 200))
    assert higher.recovery_ci == pytest.approx((50, 50)), "items differ, their ratio does not"
    assert math.isnan(compare([0, 0], [1, 1], mean, higher_is_better=True).recovery)
    assert compare([0, 0], [1, 1], mean, higher_is_better=True).recovery_ci is None


def test_intervals_of_recovery_hold_what_is_true():
    rng = np.random.default_rng(3)
    hold = 0
    for number in range(COMPARISONS):
        before, after = right_or_wrong(rng, lost=0.10, won=0.05)
        low, high = compare(before, after, mean, higher_is_better=True, seed=number).recovery_ci
        hold += low <= 100 * (0.5 - 0.10 + 0.05) / 0.5 <= high
    assert hold >= binom.ppf(0.001, COMPARISONS, 0.95)


def test_the_same_pairs_give_the_same_figures_and_one_item_none():
    before, after = real_values(np.random.default_rng(1))
    assert compare(before, after, mean, higher_is_better=True) == compare(
        before, after, mean, higher_is_better=True
    )
    one = compare([2.5], [2.0], mean, higher_is_better=True)
    assert one.p_value is None and one.recovery_ci is None and one.recovery == 80
