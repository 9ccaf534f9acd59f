"""Divergence against the formulas written out in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.numerics.divergence import divergence, log_probs, row_chunks

ROWS, VOCAB = 37, 501


def draw(seed, scale):
    return torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(seed)) * scale


def exact_kl(p_logits, q_logits):
    p, q = p_logits.double().log_softmax(-1), q_logits.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.floats(0.01, 20), st.floats(0.0, 3), st.floats(-1e3, 1e3))
def test_matches_float64(seed, scale, noise, shift):
    reference = draw(seed, scale)
    candidate = reference + draw(seed + 1, noise) + shift
    targets = torch.arange(ROWS)
    found = divergence(reference, candidate, targets)
    exact = exact_kl(reference, candidate)
    torch.testing.assert_close(found.kl_R, exact, rtol=1e-5, atol=2e-6)
    log_probability = candidate.double().log_softmax(-1)[targets, targets]
    torch.testing.assert_close(found.log_prob_R, log_probability, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(log_probs(candidate, targets), log_probability, rtol=1e-6, atol=1e-6)
    assert torch.equal(found.top1_R, candidate.argmax(-1))


def test_is_zero_only_for_equal_predictions():
    reference = draw(0, 4)
    targets = torch.zeros(ROWS, dtype=torch.int64)
    assert divergence(reference, reference + 3.5, targets).kl_R.max() < 1e-6
    assert divergence(reference, reference * 1.01, targets).kl_R.min() > 1e-6


def test_is_of_the_candidate_to_the_reference_and_not_the_other_way():
    sure, unsure = torch.tensor([[10.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    target = torch.zeros(1, dtype=torch.int64)
    assert divergence(sure, unsure, target).kl_R.item() == pytest.approx(0.6926, abs=1e-3)
    assert divergence(unsure, sure, target).kl_R.item() == pytest.approx(4.307, abs=1e-3)


def test_stays_finite_where_probabilities_underflow():
    reference = torch.tensor([[0.0, -500.0, -1000.0]])
    candidate = torch.tensor([[-1000.0, -500.0, 0.0]])
    kl = divergence(reference, candidate, torch.tensor([0])).kl_R
    assert kl.item() == pytest.approx(1000.0, rel=1e-6)


@pytest.mark.parametrize(("rows", "vocab"), [(512, 49152), (7, 3), (3, 1 << 23)])
def test_chunks_cover_every_row_once(rows, vocab):
    covered = [
        row
        for chunk in row_chunks(rows, vocab, torch.device("cpu"))
        for row in range(chunk.start, chunk.stop)
    ]
    assert covered == list(range(rows))
