"""What paired answers say of two models: intervals over items, and whether a change is more than luck.

Items are the units: resampled with replacement, the same ones for both models. Seeded: the same pairs give the same
figures. Right/wrong metrics are tested by McNemar's exact test on the items that changed; others by the bootstrap
distribution of the difference around what was found: the chance that luck alone differs by as much, either way.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

RESAMPLES = 2000
SLOW_RESAMPLES = 500  # of scores that are no means of numbers, aggregated one by one
ELEMENTS = 1 << 22  # at a time
MCNEMAR, BOOTSTRAP = "McNemar, exact", "paired bootstrap"

Array = np.ndarray[Any, np.dtype[Any]]
Interval = tuple[float, float]


class Comparison(NamedTuple):
    """Scores with 95 % intervals; recovery in percent of the reference's score, what is better being more.

    p_value: of no difference; None with a single item, as recovery_ci.
    """

    reference: float
    candidate: float
    reference_ci: Interval
    candidate_ci: Interval
    recovery: float
    recovery_ci: Interval | None
    p_value: float | None
    test: str


def compare(
    reference: Sequence[Any],
    candidate: Sequence[Any],
    aggregate: Callable[[Sequence[Any]], float],
    *,
    higher_is_better: bool,
    seed: int = 0,
) -> Comparison:
    """reference, candidate: a metric's values for the same items in the same order. aggregate: values to a score."""
    scores = float(aggregate(reference)), float(aggregate(candidate))
    is_right_or_wrong = is_binary(reference) and is_binary(candidate)
    first_R, second_R = _resampled_scores(reference, candidate, aggregate, scores, seed)
    recovery_R = _recovery(first_R, second_R, higher_is_better)
    recovery = float(_recovery(np.array(scores[0]), np.array(scores[1]), higher_is_better))
    has_spread = len(reference) > 1
    if is_right_or_wrong:
        p_value: float | None = mcnemar(reference, candidate)
    else:
        p_value = _p_value(second_R - first_R, scores[1] - scores[0], len(reference)) if has_spread else None
    return Comparison(
        reference=scores[0],
        candidate=scores[1],
        reference_ci=_interval(first_R),
        candidate_ci=_interval(second_R),
        recovery=recovery,
        recovery_ci=_finite(_interval(np.nan_to_num(recovery_R, nan=math.inf))) if has_spread else None,
        p_value=p_value,
        test=MCNEMAR if is_right_or_wrong else BOOTSTRAP,
    )


def is_binary(values: Sequence[Any]) -> bool:
    """Whether each item is right or wrong."""
    return all(isinstance(value, bool | int | float | np.number) and value in (0, 1) for value in values)


def mcnemar(reference: Sequence[Any], candidate: Sequence[Any]) -> float:
    """Two-sided: that so many of the items that changed, or more, changed the same way, if each way is as likely."""
    from scipy.stats import binomtest

    lost = sum(before > after for before, after in zip(reference, candidate, strict=True))
    won = sum(before < after for before, after in zip(reference, candidate, strict=True))
    return float(binomtest(lost, lost + won, 0.5).pvalue) if lost + won else 1.0


def _recovery(reference: Array, candidate: Array, higher_is_better: bool) -> Array:
    """Percent; NaN where the reference has no positive score."""
    better, worse = (candidate, reference) if higher_is_better else (reference, candidate)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((reference > 0) & (worse > 0), 100 * better / worse, np.nan)


def _resampled_scores(
    reference: Sequence[Any],
    candidate: Sequence[Any],
    aggregate: Callable[[Sequence[Any]], float],
    scores: Interval,
    seed: int,
) -> tuple[Array, Array]:
    """Both models' scores on the same resampled items, [resamples] each."""
    rng = np.random.default_rng(seed)
    count = len(reference)
    if _are_means((reference, candidate), scores):
        values_2N = np.array([reference, candidate], dtype=np.float64)
        together = max(1, ELEMENTS // count)
        sizes = [min(together, RESAMPLES - done) for done in range(0, RESAMPLES, together)]
        parts = [values_2N[:, rng.integers(count, size=(size, count))].mean(axis=-1) for size in sizes]
        first_R, second_R = np.concatenate(parts, axis=1)
        return first_R, second_R
    pairs = []
    for _ in range(SLOW_RESAMPLES):
        chosen = rng.integers(count, size=count)
        pairs.append([aggregate([values[at] for at in chosen]) for values in (reference, candidate)])
    first_R, second_R = np.array(pairs, dtype=np.float64).T
    return first_R, second_R


def _are_means(both: tuple[Sequence[Any], Sequence[Any]], scores: Interval) -> bool:
    """Whether the scores are the values' means, whatever lm-eval calls the function."""
    for values, score in zip(both, scores, strict=True):
        if not all(isinstance(value, bool | int | float | np.number) for value in values):
            return False
        if not math.isclose(float(np.mean(values)), score, rel_tol=1e-9, abs_tol=1e-12):
            return False
    return True


def _interval(scores_R: Array) -> Interval:
    low, high = np.percentile(scores_R, [2.5, 97.5], method="nearest")
    return float(low), float(high)


def _finite(interval: Interval) -> Interval | None:
    """None where too many resamples had no score to recover."""
    return interval if all(map(math.isfinite, interval)) else None


def _p_value(differences_R: Array, found: float, count: int) -> float:
    """How often the differences lie as far from what was found as that lies from none.

    A resample of N items varies by (N − 1) / N of what a new sample would.
    """
    deviations_R = np.abs(differences_R - found) * math.sqrt(count / (count - 1))
    as_far = int((deviations_R >= abs(found) * (1 - 1e-9)).sum())
    return (as_far + 1) / (len(differences_R) + 1)
