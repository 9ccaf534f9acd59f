"""Sampling: what each filter keeps, that distributions are distributions, that seeds repeat."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.errors import GenerationError
from quantkit.runtime.sampler import Sampler, next_token_probabilities
from quantkit.runtime.sampling_params import SamplingParams

LOGITS = torch.tensor([1.0, 3.0, 0.0, 2.0, -1.0])  # by likelihood: 1, 3, 0, 2, 4


def kept(**params):
    return set(
        next_token_probabilities(LOGITS, SamplingParams(temperature=1.0, **params))
        .nonzero()
        .flatten()
        .tolist()
    )


def test_temperature_one_without_filters_is_softmax():
    result = next_token_probabilities(LOGITS, SamplingParams(temperature=1.0))
    torch.testing.assert_close(result, LOGITS.softmax(-1))


def test_temperature_divides_the_logits():
    result = next_token_probabilities(LOGITS, SamplingParams(temperature=0.5))
    torch.testing.assert_close(result, (LOGITS / 0.5).softmax(-1))


def test_what_each_filter_keeps():
    assert kept(top_k=2) == {1, 3}
    assert kept(top_k=99) == {0, 1, 2, 3, 4}
    # softmax: 0.636, 0.234, 0.086, 0.032, 0.012
    assert kept(top_p=0.6) == {1}
    assert kept(top_p=0.7) == {1, 3}
    assert kept(top_p=0.88) == {0, 1, 3}
    assert kept(top_p=1.0) == {0, 1, 2, 3, 4}
    assert kept(min_p=0.3) == {1, 3}
    assert kept(min_p=1.0) == {1}
    assert kept(top_k=3, top_p=0.9) == {1, 3}, "top_p counts what top_k left"


def test_the_filters_equal_those_of_transformers():
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    random = torch.Generator().manual_seed(0)
    for temperature, top_k, top_p, min_p in (
        (0.7, 20, 0.9, 0.02),
        (1.5, 5, 0.5, 0.001),
        (1.0, 50, 0.99, 0.2),
    ):
        logits = torch.randn(1, 50, generator=random) * 3
        scores = logits
        for warper in (
            TemperatureLogitsWarper(temperature),
            TopKLogitsWarper(top_k),
            TopPLogitsWarper(top_p),
            MinPLogitsWarper(min_p),
        ):
            scores = warper(None, scores)
        params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        torch.testing.assert_close(next_token_probabilities(logits[0], params), scores.softmax(-1)[0])


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40),
    temperature=st.floats(1e-3, 100),
    top_k=st.none() | st.integers(1, 50),
    top_p=st.floats(1e-3, 1),
    min_p=st.floats(0, 1),
)
def test_any_settings_leave_a_distribution_with_the_likeliest_token(logits, temperature, top_k, top_p, min_p):
    logits_V = torch.tensor(logits)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    result = next_token_probabilities(logits_V, params)
    assert result.isfinite().all()
    assert (result >= 0).all()
    assert abs(float(result.sum()) - 1) < 1e-5
    assert result[logits_V.argmax()] == result.max()
    assert top_k is None or (result > 0).sum() <= top_k


def test_greedy_takes_the_likeliest_and_the_first_of_equals():
    assert Sampler(SamplingParams()).choose(LOGITS) == 1
    assert Sampler(SamplingParams()).choose(torch.tensor([0.0, 5.0, 5.0])) == 1


def test_a_seed_repeats_and_another_differs():
    def draw(seed):
        sampler = Sampler(SamplingParams(temperature=2.0, seed=seed))
        return [sampler.choose(LOGITS) for _ in range(40)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert len(set(draw(7))) > 2, "one state runs on, it is not reset for every token"


def test_draws_follow_the_distribution():
    sampler = Sampler(SamplingParams(temperature=1.0, seed=0))
    draws = torch.tensor([sampler.choose(LOGITS) for _ in range(4000)])
    frequencies = torch.bincount(draws, minlength=5) / 4000
    assert (frequencies - LOGITS.softmax(-1)).abs().max() < 0.03


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 2.0},
        {"seed": -1},
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(wrong):
    with pytest.raises(GenerationError) as caught:
        SamplingParams(**wrong)
    assert next(iter(wrong)) in caught.value.problem
    assert caught.value.fix
