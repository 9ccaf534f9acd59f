"""Where in a text predictions differ: by position in the window, by the kind of token that comes next, the worst ones.

The KL at a position is about the token after it. Classes are told from a token's own text:

    newline, space      white space alone             number    digits                 code      of ` {}[]<>=_/\\|`…
    word start          begins with a space, or the text before it ends in one; letters follow
    continuation        letters in the middle of a word                                punctuation, other

Shape suffixes: T positions of a window.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from torch import Tensor

from quantkit.evaluation.scores import WindowScores

CODE = frozenset("{}[]<>=_/\\|`~^@#$%&*+")
HISTOGRAM_EDGES = (0.0, *(10 ** (step / 4) for step in range(-24, 7)))  # nats: 10^-6 … 10^1.5, four a decade
LEAST_CONTEXT = 8  # tokens before an example

Decode = Callable[[Sequence[int]], str]


class Spot(NamedTuple):
    """A position of a window."""

    window: int
    position: int
    kl: float


def histogram(kl_per_window: Sequence[Tensor]) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Edges, and how many positions are between each two; the last edge is as far out as there are positions."""
    kl = np.concatenate([kl_T.numpy() for kl_T in kl_per_window])
    edges = (*HISTOGRAM_EDGES[:-1], max(HISTOGRAM_EDGES[-1], float(kl.max())))
    counts, _ = np.histogram(kl, bins=edges)
    return edges, tuple(int(count) for count in counts)


def by_position(kl_per_window: Sequence[Tensor]) -> tuple[tuple[int, int, float], ...]:
    """(first, last + 1, mean KL) of positions 0, 1 to 3, 4 to 15, 16 to 63 …"""
    length = len(kl_per_window[0])
    mean_T = np.mean([kl_T.numpy() for kl_T in kl_per_window], axis=0)
    bounds = [0]
    while bounds[-1] < length:
        bounds.append(min(4 ** (len(bounds) - 1), length))
    return tuple((first, last, float(mean_T[first:last].mean())) for first, last in pairwise(bounds))


def by_class(
    windows: Sequence[Tensor], kl_per_window: Sequence[Tensor], decode: Decode
) -> tuple[tuple[str, float, float], ...]:
    """(class, share of positions, mean KL) by the token that follows, the class that loses most in all first."""
    kls: dict[str, list[float]] = defaultdict(list)
    for ids_T, kl_T in zip(windows, kl_per_window, strict=True):
        for (first, second), kl in zip(pairwise(ids_T.tolist()), kl_T.tolist(), strict=False):
            before = decode([first])
            # some tokenizers drop the space before a lone token
            text = decode([first, second])[len(before) :]
            kls[token_class(text, before)].append(kl)
    total = sum(map(len, kls.values()))
    ordered = sorted(kls.items(), key=lambda item: -sum(item[1]))
    return tuple((name, len(values) / total, sum(values) / len(values)) for name, values in ordered)


def token_class(text: str, before: str) -> str:
    """The class of a token by its text and that of the token before it."""
    bare = text.strip()
    if not bare:
        return "newline" if "\n" in text else "space"
    if bare.isdigit():
        return "number"
    if bare[0].isalpha():
        return "word start" if text[0].isspace() or not before[-1:].isalpha() else "continuation"
    if CODE.intersection(bare):
        return "code symbol"
    return "punctuation" if all(character.isascii() for character in bare) else "other"


def worst_spots(scores: Sequence[WindowScores], count: int) -> list[Spot]:
    """The positions of largest KL at which the likeliest tokens differ, if there is one in the window.

    One of each window at most, so that one passage is not shown many times.
    """
    spots = []
    for window, (kl_T, _, agrees_T) in enumerate(scores):
        start = min(LEAST_CONTEXT, len(kl_T) - 1)
        shown_T = kl_T - agrees_T * (1 + kl_T.max())  # those that agree come after all others
        position = start + int(shown_T[start:].argmax())
        spots.append(Spot(window, position, float(kl_T[position])))
    return sorted(spots, key=lambda spot: -spot.kl)[:count]
