"""When a sequence ends, and why."""

import pytest

from quantkit.runtime.sequence import FinishReason, Sequence
from tests.unit.runtime.fake_engine import Params


def generate(token_ids, *, prompt_ids=(5, 6), limit=100, eos_ids=frozenset({1}), **params):
    """The tokens up to the one that was the last, and the reason."""
    sequence = Sequence(
        sequence_id=0, prompt_ids=list(prompt_ids), params=Params(**params), eos_ids=eos_ids, arrival=0
    )
    sequence.limit = min(sequence.limit, limit)
    for token_id in token_ids:
        sequence.token_ids.append(token_id)
        if finish := sequence.finish_after_last():
            return sequence.token_ids[len(prompt_ids) :], finish
    return sequence.token_ids[len(prompt_ids) :], None


def test_it_ends_after_max_tokens():
    assert generate([7, 8, 9, 7], max_tokens=3) == ([7, 8, 9], FinishReason.LENGTH)


def test_it_ends_with_a_stop_token():
    assert generate([7, 1, 9]) == ([7, 1], FinishReason.STOP)
    assert generate([7, 9, 1], stop_token_ids=(9,)) == ([7, 9], FinishReason.STOP)


def test_a_stop_token_that_is_also_the_last_possible_one_is_a_stop():
    assert generate([7, 1], max_tokens=2, limit=4) == ([7, 1], FinishReason.STOP)


def test_stop_tokens_in_the_prompt_do_not_end_it():
    assert generate([7], prompt_ids=[1, 1]) == ([7], None)


def test_ignore_eos_ignores_the_models_stop_tokens_and_no_others():
    assert generate([1, 9], ignore_eos=True, stop_token_ids=(9,)) == ([1, 9], FinishReason.STOP)


@pytest.mark.parametrize("min_tokens", [0, 1, 2, 3])
def test_min_tokens_come_before_a_stop_token(min_tokens):
    assert generate([1, 1, 1, 1, 1], min_tokens=min_tokens) == ([1] * (min_tokens + 1), FinishReason.STOP)


def test_it_ends_where_the_model_takes_no_more():
    assert generate([7, 8, 9], max_tokens=5, limit=4) == ([7, 8], FinishReason.CONTEXT)


def test_max_tokens_are_the_reason_where_both_limits_meet():
    assert generate([7, 8, 9], max_tokens=2, limit=4) == ([7, 8], FinishReason.LENGTH)


def test_priority_comes_before_arrival():
    def order(number, priority, arrival):
        sequence = Sequence(
            sequence_id=number,
            prompt_ids=[5],
            params=Params(),
            eos_ids=frozenset(),
            priority=priority,
            arrival=arrival,
        )
        return sequence.order

    assert order(4, -1, 9) < order(3, 0, 1) < order(1, 0, 2) < order(2, 0, 2) < order(0, 1, 0)
