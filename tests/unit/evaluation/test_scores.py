"""Scores of windows against the same figures computed in float64 from all logits at once."""

import numpy as np
import pytest
import torch

from quantkit.evaluation.scores import (
    NotFiniteError,
    bootstrap_interval,
    perplexity,
    reference_window,
    score_window,
    summarise,
)

WINDOWS, LENGTH, VOCAB = 5, 40, 300


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCAB, (WINDOWS, LENGTH), generator=generator)
    reference = torch.randn(WINDOWS, LENGTH, VOCAB, generator=generator) * 4
    candidate = reference + torch.randn(WINDOWS, LENGTH, VOCAB, generator=generator) * 0.7
    return ids, reference, candidate


def scored(ids, reference, candidate, part=LENGTH):
    windows = [reference_window(whole.split(part), of) for whole, of in zip(reference, ids, strict=True)]
    pairs = zip(windows, candidate, ids, strict=True)
    scores = [score_window(window, whole.split(part), of) for window, whole, of in pairs]
    return windows, scores


def test_figures_match_float64(data):
    ids, reference, candidate = data
    windows, scores = scored(*data)
    p, q = reference.double().log_softmax(-1), candidate.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    following = ids[:, 1:].unsqueeze(-1)
    ppl_p = p[:, :-1].gather(-1, following).mean().neg().exp().item()
    ppl_q = q[:, :-1].gather(-1, following).mean().neg().exp().item()

    assert perplexity([window.log_prob_T for window in windows]) == pytest.approx(ppl_p, rel=1e-6)
    damage = summarise(scores, ppl_p, 0.25)
    assert damage.ppl == pytest.approx(ppl_q, rel=1e-6)
    assert damage.ppl_increase == pytest.approx(100 * (ppl_q - ppl_p) / ppl_p, rel=1e-4)
    assert damage.kl_mean == pytest.approx(kl.mean().item(), abs=1e-5)
    assert damage.kl_median == pytest.approx(kl.median().item(), rel=0.02)
    assert damage.kl_p99 == pytest.approx(np.quantile(kl.numpy(), 0.99), rel=1e-3)
    assert damage.top1 == (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert damage.kl_ci[0] < damage.kl_mean < damage.kl_ci[1]
    assert damage.kl_noise_floor == 0.25


def test_reference_against_itself_is_zero_up_to_the_stored_precision(data):
    ids, reference, _ = data
    windows, scores = scored(ids, reference, reference)
    damage = summarise(scores, perplexity([window.log_prob_T for window in windows]), 0.0)
    assert damage.kl_mean <= 4.7e-8 and damage.kl_p99 <= 5e-7
    assert damage.top1 == 1.0
    assert damage.ppl_increase == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("part", [1, 7])
def test_logits_in_parts_give_what_all_of_them_give(data, part):
    for whole, in_parts in zip(scored(*data), scored(*data, part=part), strict=True):
        for one, other in zip(whole, in_parts, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("value", "kind"), [(float("nan"), "NaN"), (float("inf"), "infinite"), (-float("inf"), "infinite")]
)
def test_logits_that_are_not_finite_are_named_with_their_position(data, value, kind):
    ids, reference, candidate = data
    broken = candidate[0].clone()
    broken[17, 5] = value
    with pytest.raises(NotFiniteError, match=f"{kind} logits at position 17"):
        score_window(reference_window([reference[0]], ids[0]), broken.split(11), ids[0])
    with pytest.raises(NotFiniteError, match="position 17"):
        reference_window([broken], ids[0])


def test_bootstrap_interval_covers_the_mean_about_as_often_as_it_says():
    draw = np.random.default_rng(1)
    hits = 0
    for _ in range(60):
        low, high = bootstrap_interval(draw.exponential(size=24))
        hits += low <= 1.0 <= high
    assert (
        49 <= hits <= 60
    )  # 95 % of 60 is 57; a percentile interval of 24 skewed values covers a little less


def test_bootstrap_interval_shrinks_with_the_number_of_windows():
    draw = np.random.default_rng(2)
    few, many = (bootstrap_interval(draw.normal(size=count)) for count in (16, 400))
    assert (few[1] - few[0]) > 3 * (many[1] - many[0])
    assert bootstrap_interval(np.ones(8)) == (1.0, 1.0)


def test_bootstrap_interval_is_repeatable_and_absent_for_one_window():
    values = np.arange(10.0)
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval(values[:1]) is None
