"""How much of a long answer is new: models that lost too much begin to repeat themselves."""

from collections.abc import Sequence
from typing import Any

SIZE = 4


def process_results(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """lm-eval's hook: `distinct` of one generated text."""
    return {"distinct": distinct(results[0])}


def distinct(text: str) -> float:
    """1 − share of repeated runs of four words, of all such runs; 1 for a text of fewer words."""
    words = text.split()
    runs = list(zip(*(words[start:] for start in range(SIZE)), strict=False))
    return len(set(runs)) / len(runs) if runs else 1.0
