"""Sampling: the distributions, that a row depends on nothing but itself, and what rows may ask to be done to logits."""

import itertools

import pytest
import torch

from quantkit.runtime.logit_adjustments import SLOT_BYTES
from quantkit.runtime.sampler import Choice, NewRow, Sampler, Work
from quantkit.runtime.sampling_params import SamplingParams

LOGITS = torch.tensor([1.0, 3.0, 0.0, 2.0, -1.0])  # by likelihood: 1, 3, 0, 2, 4
CPU = torch.device("cpu")


def sampler_of(*params, vocab_size=5, prompt=(0, 4), answer=(), stop_ids=frozenset()):
    """A sampler with a row for each of the parameters."""
    sampler = Sampler(len(params), vocab_size, CPU)
    sampler.assign([NewRow(row, each, prompt, answer, stop_ids) for row, each in enumerate(params)])
    return sampler


def sample(sampler, logits_BV, rows, positions):
    """A step over these rows."""
    operands = torch.tensor(rows), torch.tensor(positions)
    return sampler.sample(logits_BV, *operands, sampler.work(rows, positions))


def draw(params, count, logits=LOGITS):
    """Tokens of one sequence at many positions, for which a step has as many rows."""
    rows = list(range(min(count, 500)))
    sampler = sampler_of(*[params] * len(rows), vocab_size=len(logits))
    logits = logits.repeat(len(rows), 1)
    steps = range(2, 2 + count, len(rows))
    each = [sample(sampler, logits, rows, [start + row for row in rows]).token_ids_B for start in steps]
    return torch.cat(each)[:count]


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, LOGITS.softmax(0)),
        ({"temperature": 2.0}, (LOGITS / 2).softmax(0)),
        ({"top_k": 3}, LOGITS[[0, 1, 3]].softmax(0)),
        ({"top_p": 0.88}, LOGITS[[0, 1, 3]].softmax(0)),
        ({"min_p": 0.1}, LOGITS[[0, 1, 3]].softmax(0)),
        ({"logit_bias": {4: 3.0, 1: -1.0}}, torch.tensor([1.0, 2, 0, 2, 2]).softmax(0)),
    ],
)
def test_draws_follow_the_distribution(params, expected):
    count = 20_000
    tokens = draw(SamplingParams(**({"temperature": 1.0, "seed": 11} | params)), count)
    kept = [0, 1, 3] if len(expected) == 3 else list(range(5))
    observed = tokens.bincount(minlength=5).double()
    assert observed[kept].sum() == count, "nothing else is drawn"
    expected = count * expected.double()
    chi_square = ((observed[kept] - expected) ** 2 / expected).sum()
    assert chi_square < 23.5, "as unlikely as one in 10 000, with four degrees of freedom"


def test_draws_of_a_large_vocabulary_follow_the_distribution():
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    tokens = draw(SamplingParams(temperature=1.0, seed=3), 2000, logits)
    group = torch.arange(5000) % 10  # neighbours, and so words of one counter, in different groups
    expected = 2000 * torch.zeros(10).index_add(0, group, logits.softmax(0))
    chi_square = ((group[tokens].bincount(minlength=10) - expected) ** 2 / expected).sum()
    assert chi_square < 33.7, "as unlikely as one in 10 000, with nine degrees of freedom"


def test_a_row_alone_is_as_in_any_batch():
    params = [
        SamplingParams(temperature=1.3, seed=5),
        SamplingParams(temperature=0.9, seed=5, top_p=0.8),
        SamplingParams(),
        SamplingParams(temperature=1.0, seed=6, top_k=20, min_p=0.01),
        SamplingParams(temperature=1.0, seed=7, presence_penalty=1.0, frequency_penalty=0.5),
        SamplingParams(temperature=1.0, seed=8, logit_bias={3: 4.0}),
    ]
    logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(0))
    together = sample(sampler_of(*params, vocab_size=300), logits, list(range(6)), [9] * 6).token_ids_B
    for row in range(6):
        alone = sample(sampler_of(*params, vocab_size=300), logits[row : row + 1], [row], [9]).token_ids_B
        assert alone[0] == together[row]
    backwards = sample(sampler_of(*params, vocab_size=300), logits.flip(0), [5, 4, 3, 2, 1, 0], [9] * 6)
    assert torch.equal(backwards.token_ids_B.flip(0), together)


def test_a_seed_repeats_and_another_differs():
    one, again, other = (draw(SamplingParams(temperature=2.0, seed=seed), 40).tolist() for seed in (7, 7, 8))
    assert one == again != other
    assert len(set(one)) > 2, "every position has noise of its own"
    assert len(set(draw(SamplingParams(temperature=2.0), 40).tolist())) > 2, (
        "and so has every row without a seed"
    )


def test_greedy_takes_the_likeliest_and_the_first_of_equals():
    logits = torch.stack([LOGITS, torch.tensor([0.0, 5.0, 5.0, 1.0, 1.0])])
    sampler = sampler_of(SamplingParams(), SamplingParams())
    assert sampler.work([0, 1], [2, 2]) == Work(Choice.GREEDY)
    assert sample(sampler, logits, [0, 1], [2, 2]).token_ids_B.tolist() == [1, 1]
    with_a_draw = sampler_of(SamplingParams(), SamplingParams(temperature=1.0, top_k=1))
    assert sample(with_a_draw, logits, [0, 1], [2, 2]).token_ids_B.tolist() == [1, 1]


def test_a_step_does_what_its_rows_ask_for_and_not_more():
    sampler = sampler_of(
        SamplingParams(),
        SamplingParams(temperature=1.0, min_p=0.1),
        SamplingParams(temperature=1.0, top_p=0.9),
        SamplingParams(min_tokens=3, max_tokens=5),
        SamplingParams(logprobs=2),
        SamplingParams(presence_penalty=0.1),
    )
    for rows, work in (
        ([0], Work(Choice.GREEDY)),
        ([0, 1], Work(Choice.RANDOM)),
        ([2, 0], Work(Choice.FILTERED)),
        ([3], Work(Choice.GREEDY, adjusts=True)),
        ([4], Work(Choice.GREEDY, num_logprobs=2)),
        ([1, 4, 5], Work(Choice.RANDOM, adjusts=True, num_logprobs=2)),
        ([], Work(Choice.GREEDY)),
    ):
        assert sampler.work(rows, [2] * len(rows)) == work
    assert sampler.work([3], [4]).adjusts
    assert not sampler.work([3], [5]).adjusts, "after three tokens"
    sampler.assign([NewRow(5, SamplingParams(), (1,), (), frozenset())])
    assert sampler.work([5], [1]) == Work(Choice.GREEDY)


def test_a_row_with_nan_is_said_to_be_and_has_a_token_of_the_vocabulary():
    logits = LOGITS.repeat(3, 1)
    logits[1, 2] = torch.nan
    for params in (
        SamplingParams(),
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=1.0, top_p=0.5),
    ):
        sampled = sample(sampler_of(params, params, params), logits, [0, 1, 2], [2, 2, 2])
        assert sampled.is_nan_B.tolist() == [False, True, False]
        assert sampled.token_ids_B[1] == 2


def penalized(params, prompt, tokens, logits=LOGITS):
    """By the definition, in plain Python: repetition, frequency, presence."""
    result = logits.clone()
    for token in set(prompt) | set(tokens):
        factor = params.repetition_penalty
        result[token] = result[token] / factor if result[token] > 0 else result[token] * factor
    for token in tokens:
        result[token] -= params.frequency_penalty
    for token in set(tokens):
        result[token] -= params.presence_penalty
    return result


@pytest.mark.parametrize(
    "params",
    [
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.7},
        {"repetition_penalty": 1.6},
        {"presence_penalty": -0.3, "frequency_penalty": 0.5, "repetition_penalty": 0.8},
    ],
)
def test_penalties_follow_the_tokens_so_far(params):
    """Greedy tokens, in a batch with rows that ask for nothing and for something else, and after a restart."""
    prompt, params = [2, 2, 4], SamplingParams(max_tokens=12, **params)
    others = [SamplingParams(), SamplingParams(frequency_penalty=2.0)]
    sampler, expected = sampler_of(others[0], params, others[1], prompt=prompt), []
    for step in range(12):
        if step == 6:  # preempted, and back in another row
            sampler.assign([NewRow(0, params, prompt, expected, frozenset())])
            sampler.assign([NewRow(1, others[0], prompt, (), frozenset())])
        rows = [0, 1, 2] if step < 6 else [2, 0]
        tokens = sample(sampler, LOGITS.repeat(len(rows), 1), rows, [3 + step] * len(rows)).token_ids_B
        expected.append(int(penalized(params, prompt, expected).argmax()))
        assert tokens[1] == expected[-1]
    assert len(set(expected)) > 1


def test_slots_for_penalties_are_made_when_asked_for_and_used_again():
    sampler = Sampler(64, 5, CPU)
    penalty, nothing = SamplingParams(presence_penalty=1.0), SamplingParams()
    assert len(sampler._adjustments._counts_SV) == 0
    for row in itertools.chain(range(40), range(40)):
        sampler.assign([NewRow(row, penalty, (1,), (2,), frozenset())])
        sampler.assign([NewRow(row, nothing, (1,), (2,), frozenset())])
    assert len(sampler._adjustments._counts_SV) <= 4
    for row in range(64):
        sampler.assign([NewRow(row, penalty, (1,), (row % 5,), frozenset())])
    slots = sampler._adjustments._slots
    assert sorted(slots.values()) == list(range(1, 65))
    counts = sampler._adjustments._counts_SV
    assert len(counts) == 65
    assert counts.nbytes + sampler._adjustments._is_in_prompt_SV.nbytes == 65 * 5 * SLOT_BYTES
    assert all(
        counts[slots[row]].tolist() == [int(token == row % 5) for token in range(5)] for row in range(64)
    )


def test_stop_tokens_are_banned_until_there_are_enough_tokens():
    params = SamplingParams(min_tokens=2, max_tokens=5)
    sampler = sampler_of(params, SamplingParams(), stop_ids=frozenset({1, 3}))
    logits = LOGITS.repeat(2, 1)
    tokens = [sample(sampler, logits, [0, 1], [2 + number] * 2).token_ids_B.tolist() for number in range(3)]
    assert tokens == [[0, 1], [0, 1], [1, 1]]


def test_a_bias_wins_and_a_new_owner_of_the_row_has_none():
    sampler = sampler_of(SamplingParams(logit_bias={4: 100, 1: -100}), SamplingParams())
    logits = LOGITS.repeat(2, 1)
    assert sample(sampler, logits, [0, 1], [2, 2]).token_ids_B.tolist() == [4, 1]
    assert sample(sampler, logits, [1, 0], [2, 2]).token_ids_B.tolist() == [1, 4]
    sampler.assign([NewRow(0, SamplingParams(), (0,), (), frozenset())])
    assert sample(sampler, logits, [0, 1], [2, 2]).token_ids_B.tolist() == [1, 1]


def test_logprobs_are_of_the_raw_logits():
    """Whatever chose the token; also where rows are done in parts."""
    count = 70
    params = SamplingParams(temperature=5.0, seed=1, logit_bias={4: 3.0}, logprobs=3)
    logits = torch.randn(count, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    sampled = sample(
        sampler_of(params, vocab_size=50), logits.bfloat16(), [0] * count, list(range(2, 2 + count))
    )
    expected = logits.bfloat16().double().log_softmax(1)
    for row, found in enumerate(sampled.logprobs.of_tokens()):
        token = sampled.token_ids_B[row]
        assert found.logprob == pytest.approx(float(expected[row, token]), abs=1e-5)
        assert found.rank == 1 + int((expected[row] > expected[row, token]).sum())
        top = expected[row].sort(descending=True, stable=True)
        assert found.top_ids == top.indices[:3].tolist()
        assert found.top_logprobs == pytest.approx(top.values[:3].tolist(), abs=1e-5)


def test_no_likeliest_tokens_are_reported_where_none_are_asked_for():
    sampled = sample(sampler_of(SamplingParams(logprobs=0)), LOGITS[None], [0], [2])
    (found,) = sampled.logprobs.of_tokens()
    assert found.rank == 1
    assert found.top_ids == found.top_logprobs == []
