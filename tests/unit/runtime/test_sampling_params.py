"""Sampling parameters: what they refuse, by name, and what they take in another form."""

import subprocess
import sys

import pytest

from quantkit.errors import GenerationError
from quantkit.runtime.sampling_params import SamplingParams


@pytest.mark.parametrize(
    "wrong",
    [
        {"n": 0},
        {"n": 17},
        {"max_tokens": 0},
        {"max_tokens": 1.5},
        {"min_tokens": -1},
        {"min_tokens": 300},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": "hot"},
        {"top_k": 0},
        {"top_k": True},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 2.0},
        {"seed": -1},
        {"seed": 2**63},
        {"stop": [""]},
        {"stop": [1]},
        {"stop": ["x" * 257]},
        {"stop": ["x"] * 17},
        {"stop_token_ids": [-1]},
        {"stop_token_ids": ["1"]},
        {"stop_token_ids": range(257)},
        {"presence_penalty": 2.1},
        {"frequency_penalty": float("inf")},
        {"repetition_penalty": 0},
        {"logit_bias": {1: 101}},
        {"logit_bias": {"1": 1}},
        {"logit_bias": dict.fromkeys(range(1025), 1.0)},
        {"logprobs": 21},
        {"logprobs": -1},
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(wrong):
    with pytest.raises(GenerationError) as caught:
        SamplingParams(**wrong)
    assert caught.value.problem.startswith(next(iter(wrong)))
    assert caught.value.fix
    assert len(caught.value.problem) < 120


def test_one_stop_string_and_lists_become_tuples():
    params = SamplingParams(stop="end", stop_token_ids=[1, 2])
    assert params.stop == ("end",)
    assert params.stop_token_ids == (1, 2)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")


def test_what_was_given_can_change_without_the_params():
    bias = {1: 2.0}
    params = SamplingParams(logit_bias=bias)
    bias[1] = 1e9
    assert params.logit_bias == {1: 2.0}


def test_answers_have_seeds_of_their_own():
    params = SamplingParams(n=3, seed=2**63 - 1, temperature=1.0)
    assert [params.answer(number).seed for number in range(3)] == [2**63 - 1, 0, 1]
    assert params.answer(1).n == 1
    assert SamplingParams(n=2).answer(1).seed is None


@pytest.mark.parametrize("field", [{"stop_token_ids": [5, 100]}, {"logit_bias": {100: 1.0}}])
def test_tokens_that_the_model_does_not_have(field):
    params = SamplingParams(**field)
    params.check_token_ids(101)
    with pytest.raises(GenerationError, match=r"no token 100"):
        params.check_token_ids(100)


def test_they_need_no_torch():
    code = "import sys; sys.modules['torch'] = None; import quantkit.runtime.sampling_params"
    subprocess.run([sys.executable, "-c", code], check=True)
