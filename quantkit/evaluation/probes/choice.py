"""Items of which one of several answers is right."""

from collections.abc import Sequence
from random import Random
from typing import Any


def choice_item(rng: Random, prompt: str, choices: Sequence[str]) -> dict[str, Any]:
    """The first of `choices` is right; the item has them in random order, and the place of the right one."""
    assert len(set(choices)) == len(choices), "answers are distinct"
    order = rng.sample(range(len(choices)), len(choices))
    return {"prompt": prompt, "choices": [choices[place] for place in order], "answer": order.index(0)}
