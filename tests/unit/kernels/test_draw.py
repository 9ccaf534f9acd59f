"""`draw` in plain torch: Philox against its published values, the filters against those of transformers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit_kernels.draw import draw, kept_tokens, pack_settings, philox, scaled_logits, unpack_settings

LOGITS = torch.tensor([[1.0, 3.0, 0.0, 2.0, -1.0]])  # by likelihood: 1, 3, 0, 2, 4


def settings_of(*, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0):
    row = pack_settings(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    return torch.tensor([row], dtype=torch.int32)


def kept(logits_BV, **filters):
    rows = torch.zeros(len(logits_BV), dtype=torch.int64)
    return kept_tokens(logits_BV, unpack_settings(settings_of(**filters), rows))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_published_words(counter, key, expected):
    """The known answers of the authors' Random123 library, philox4x32 with 10 rounds."""
    counter, key = ([torch.tensor([int(word, 16)]) for word in words.split()] for words in (counter, key))
    assert [int(word) for word in philox(tuple(counter), tuple(key))] == [
        int(word, 16) for word in expected.split()
    ]


def test_what_each_filter_keeps():
    def tokens(**filters):
        return set(kept(LOGITS, **filters)[0].nonzero()[:, 0].tolist())

    assert tokens(top_k=2) == {1, 3}
    assert tokens(top_k=99) == {0, 1, 2, 3, 4}
    # softmax: 0.636, 0.234, 0.086, 0.032, 0.012
    assert tokens(top_p=0.6) == {1}
    assert tokens(top_p=0.7) == {1, 3}
    assert tokens(top_p=0.88) == {0, 1, 3}
    assert tokens(top_p=1.0) == {0, 1, 2, 3, 4}
    assert tokens(min_p=0.3) == {1, 3}
    assert tokens(min_p=1.0) == {1}
    assert tokens(top_k=3, top_p=0.9) == {1, 3}, "top p counts what top k left"


def test_of_equal_logits_the_first_are_kept():
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, 2.0, 1.0]])
    assert kept(logits, top_k=2)[0].tolist() == [False, True, False, True, False, False]
    assert kept(logits, top_k=4)[0].tolist() == [False, True, True, True, True, False]
    assert kept(torch.zeros(1, 8), top_p=0.5)[0].tolist() == [True] * 4 + [False] * 4


def test_the_filters_equal_those_of_transformers():
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    random = torch.Generator().manual_seed(0)
    for temperature, top_k, top_p, min_p in (
        (0.7, 20, 0.9, 0.02),
        (1.5, 5, 0.5, 0.001),
        (1.0, 50, 0.99, 0.2),
    ):
        logits = torch.randn(20, 50, generator=random) * 3
        scores = logits
        for warper in (
            TemperatureLogitsWarper(temperature),
            TopKLogitsWarper(top_k),
            TopPLogitsWarper(top_p),
            MinPLogitsWarper(min_p),
        ):
            scores = warper(None, scores)
        got = kept(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        assert torch.equal(got, scores.isfinite())


@settings(max_examples=100, deadline=None)
@given(
    logits=st.lists(st.floats(-1e4, 1e4, width=32) | st.just(float("-inf")), min_size=1, max_size=40),
    temperature=st.floats(0, 100),
    top_k=st.integers(0, 50),
    top_p=st.floats(1e-6, 1),
    min_p=st.floats(0, 1),
    seed=st.integers(0, 2**64 - 1),
    position=st.integers(0, 2**31 - 1),
)
def test_any_settings_draw_a_kept_token(logits, temperature, top_k, top_p, min_p, seed, position):
    logits = torch.tensor([logits])
    filters = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    table, row = settings_of(**filters, seed=seed), torch.tensor([0])
    (token,), (is_nan,) = draw(logits, table, row, torch.tensor([position]), True)
    left = kept(logits, **filters)[0]
    assert left[token]
    assert left[logits[0].argmax()]
    assert top_k == 0 or left.sum() <= top_k
    assert not is_nan
    assert temperature > 0 or token == logits[0].argmax()


def test_infinite_logits_are_equally_likely_and_minus_infinity_never_comes():
    logits = torch.full((1, 6), -torch.inf).repeat(200, 1)
    rows, positions = torch.zeros(200, dtype=torch.int64), torch.arange(200)
    logits[:, 2], logits[:, 4] = torch.inf, torch.inf
    tokens, _ = draw(logits, settings_of(), rows, positions, False)
    assert 60 < int((tokens == 2).sum()) < 140
    assert set(tokens.tolist()) == {2, 4}
    logits[:, 2], logits[:, 4] = -1e30, 0.0
    assert set(draw(logits, settings_of(), rows, positions, False)[0].tolist()) == {4}


def test_scaled_logits_are_at_most_zero_whatever_the_temperature():
    rows = torch.tensor([0])
    for temperature in (1e-45, 1e-30, 1.0, 100.0):
        scaled = scaled_logits(LOGITS, unpack_settings(settings_of(temperature=temperature), rows))
        assert scaled.max() == 0
        assert not scaled.isnan().any()


def test_the_operator_says_what_it_returns_and_what_it_refuses():
    row = torch.tensor([0])
    torch.library.opcheck(
        draw, (LOGITS, settings_of(), row, row, True), test_utils=("test_schema", "test_faketensor")
    )
    for message, operands in (
        ("logits", (LOGITS.T, settings_of(), row, row)),
        ("settings", (LOGITS, settings_of().long(), row, row)),
        ("rows", (LOGITS, settings_of(), row.int(), row)),
        ("positions", (LOGITS, settings_of(), row, torch.tensor([0, 1]))),
    ):
        with pytest.raises(AssertionError, match=message):
            draw(*operands, False)
