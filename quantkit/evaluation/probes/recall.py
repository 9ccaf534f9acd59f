"""Probes of the context: copying a line, and finding a fact at some depth of a long text."""

from collections.abc import Sequence
from random import Random
from typing import Any

from quantkit.evaluation.probes import corpus
from quantkit.evaluation.probes.records import NAMES

SYLLABLES = ["ba", "den", "fi", "gor", "ka", "lum", "mi", "no", "pra", "ru", "sel", "ta", "vin"]


def copying(rng: Random, index: int, *, pieces: int = 12) -> dict[str, Any]:
    """A line of invented words and numbers, to be written again."""
    line = " ".join(rng.choice((_word, _number))(rng) for _ in range(pieces))
    return {"prompt": f"Original: {line}\nCopy:", "target": f" {line}"}


def needle(
    rng: Random, index: int, *, chars: int, depths: Sequence[float], digits: int = 5
) -> dict[str, Any]:
    """A number, told once in `chars` characters of paragraphs about other things, and asked for at the end.

    depths: where the sentence stands, of the whole text; items take them in turn.
    """
    texts, start = corpus.paragraphs(), rng.randrange(len(corpus.paragraphs()))
    hay: list[str] = []
    while sum(map(len, hay)) < chars:
        hay.append(texts[(start + len(hay)) % len(texts)])
    depth = depths[index % len(depths)]
    name, number = rng.choice(NAMES), "".join(rng.choice("0123456789") for _ in range(digits))
    fact = f"The secret number of {name} is"
    hay.insert(round(depth * len(hay)), f"{fact} {number}.")
    prompt = "\n\n".join([*hay, f"Question: What is the secret number of {name}?\nAnswer: {fact}"])
    return {"prompt": prompt, "target": f" {number}", "depth": depth}


def _word(rng: Random) -> str:
    return "".join(rng.sample(SYLLABLES, rng.randint(2, 3)))


def _number(rng: Random) -> str:
    return str(rng.randint(10, 9999))
