"""The promised error of 16-bit logits holds."""

import math

import pytest
import torch

from quantkit.numerics.logit_codes import RANGE, TOP_CODE, decode_logits, encode_logits

CPU = torch.device("cpu")


def logits(scale, rows=64, vocab=4096, seed=0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def stored_and_exact(logits_TV):
    codes = encode_logits(logits_TV)
    return codes, decode_logits(codes, slice(0, len(logits_TV)), CPU).double(), logits_TV.double()


@pytest.mark.parametrize("scale", [1e-3, 0.3, 1.0, 4.0, 30.0, 1e4])
def test_error_of_an_entry_is_half_a_step(scale):
    codes, stored, exact = stored_and_exact(logits(scale))
    below = exact.amax(-1, keepdim=True) - exact
    error = (-stored - below.clamp(max=RANGE)).abs()
    assert (error <= codes.step_T.double().unsqueeze(-1) * 0.5 + 1e-5).all()
    assert codes.step_T.max() <= RANGE / TOP_CODE * (1 + 1e-6)


@pytest.mark.parametrize("scale", [1e-3, 0.3, 1.0, 4.0, 30.0, 1e4])
def test_kl_to_the_stored_is_within_hoeffdings_bound(scale):
    codes, stored, exact = stored_and_exact(logits(scale))
    p, q = exact.log_softmax(-1), stored.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    assert (kl <= codes.step_T.double() ** 2 / 8 + 1e-12).all()
    assert kl.max() <= 4.7e-8


def test_kl_of_a_candidate_moves_by_less_than_the_bound():
    exact = logits(4.0, rows=256)
    candidate = (exact + logits(0.5, rows=256, seed=1)).double().log_softmax(-1)
    _, stored, _ = stored_and_exact(exact)

    def kl(reference):
        p = reference.double().log_softmax(-1)
        return (p.exp() * (p - candidate)).sum(-1)

    moved = kl(stored) - kl(exact)
    p = exact.double().log_softmax(-1)
    worst = RANGE / TOP_CODE * (p.exp() * (p - candidate).abs()).sum(-1) + 4.7e-8
    assert (moved.abs() <= worst).all()
    assert moved.mean().abs() < 1e-5


def test_maximum_is_exact_and_equal_entries_stay_equal():
    row = torch.tensor([[5.0, 5.0, 1.0, -60.0, -70.0], [2.0, 2.0, 2.0, 2.0, 2.0]])
    stored = decode_logits(encode_logits(row), slice(0, 2), CPU)
    assert stored[0].tolist() == pytest.approx([0, 0, -4, -40, -40], abs=1e-3)
    assert stored[1].tolist() == [0, 0, 0, 0, 0]
    assert math.isclose(stored[0, 3], stored[0, 4])


def test_entries_of_a_padded_vocabulary_do_not_coarsen_the_rest():
    row = torch.cat([logits(3.0, rows=1), torch.full((1, 100), -1e30)], dim=1)
    codes, stored, _ = stored_and_exact(row)
    assert codes.step_T.item() == pytest.approx(RANGE / TOP_CODE)
    assert (stored[0, -100:] == -RANGE).all()
