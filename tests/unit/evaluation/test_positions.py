"""Where in a text a loss is: histogram, position, class of token, worst positions."""

import pytest
import torch

from quantkit.evaluation.positions import by_class, by_position, histogram, token_class, worst_spots
from quantkit.evaluation.scores import WindowScores

WORDS = ["The", " cat", "s", " sat", ",", "\n", " ", "42", " {", "é"]


def test_histogram_counts_every_position():
    kls = [torch.tensor([0.0, 1e-7, 1e-3]), torch.tensor([1e-3, 0.5, 1e4])]
    edges, counts = histogram(kls)
    assert len(edges) == len(counts) + 1 and sum(counts) == 6
    assert counts[0] == 2 and edges[0] == 0 and edges[-1] == 1e4
    assert list(edges) == sorted(edges)


def test_positions_are_covered_once():
    kls = [torch.arange(20.0), torch.arange(20.0) + 2]
    found = by_position(kls)
    assert [bucket[:2] for bucket in found] == [(0, 1), (1, 4), (4, 16), (16, 20)]
    assert [kl for *_, kl in found] == [1.0, 3.0, 10.5, 18.5]


@pytest.mark.parametrize(
    ("before", "text", "expected"),
    [
        ("", "The", "word start"),
        ("The", " cat", "word start"),
        (" cat", "s", "continuation"),
        (" ", "x", "word start"),
        ("s", ",", "punctuation"),
        (",", "\n", "newline"),
        ("a", "  ", "space"),
        ("a", " 42", "number"),
        ("a", " {", "code symbol"),
        ("a", "_name", "code symbol"),
        ("a", "ß", "continuation"),
        ("a", "\ufffd", "other"),
    ],
)
def test_classes(before, text, expected):
    assert token_class(text, before) == expected


def test_a_position_counts_for_the_token_after_it():
    windows, kls = [torch.tensor([0, 1, 2])], [torch.tensor([1.0, 5.0, 9.0])]
    found = by_class(windows, kls, lambda ids: "".join(WORDS[token] for token in ids))
    assert found == (("continuation", 0.5, 5.0), ("word start", 0.5, 1.0))


def test_the_worst_position_of_each_window_after_some_context():
    scores = [
        WindowScores(torch.zeros(n), torch.zeros(n - 1), torch.zeros(n, dtype=torch.bool))
        for n in (20, 20, 3)
    ]
    kls = [window.kl_T for window in scores]
    kls[0][0], kls[0][12], kls[0][13], kls[1][19], kls[2][2] = 9.0, 3.0, 2.0, 4.0, 1.0
    assert [spot[:2] for spot in worst_spots(scores, 2)] == [(1, 19), (0, 12)]
    assert len(worst_spots(scores, 9)) == 3
    scores[0].agrees_T[12] = True
    scores[1].agrees_T[:] = True
    assert [spot[:2] for spot in worst_spots(scores, 2)] == [(1, 19), (0, 13)]
