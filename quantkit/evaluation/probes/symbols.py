"""Probes of symbols: sums, brackets and JSON to close. The wrong answers are of the right one's length."""

import itertools
import json
from random import Random
from typing import Any

from quantkit.evaluation.probes.choice import choice_item
from quantkit.evaluation.probes.records import record

PAIRS = {"(": ")", "[": "]", "{": "}"}


def arithmetic(rng: Random, index: int, *, digits: int = 2) -> dict[str, Any]:
    """A sum or difference of two numbers; the wrong answers differ in one digit."""
    low, high = 10 ** (digits - 1), 10**digits - 1
    left, right = rng.randint(low, high), rng.randint(low, high)
    if rng.random() < 0.5:
        problem, answer = f"{left} + {right} =", left + right
    else:
        left, right = max(left, right), min(left, right)
        problem, answer = f"{left} - {right} =", left - right
    wrong = rng.sample(_one_digit_off(answer), 3)
    return choice_item(rng, problem, [f" {number}" for number in (answer, *wrong)])


def brackets(rng: Random, index: int, *, depth: int = 4) -> dict[str, Any]:
    """Brackets of three kinds, some closed already, and the ones that close the rest."""
    still_open: list[str] = []
    text: list[str] = []
    while len(still_open) < depth:
        if still_open and rng.random() < 0.3:
            text.append(PAIRS[still_open.pop()])
        else:
            still_open.append(rng.choice(list(PAIRS)))
            text.append(still_open[-1])
    right = [PAIRS[bracket] for bracket in reversed(still_open)]
    others = [list(other) for other in itertools.product(PAIRS.values(), repeat=depth)]
    near = [other for other in others if 1 <= _differences(other, right) <= 2]
    choices = [f" {' '.join(closing)}" for closing in (right, *rng.sample(near, 3))]
    return choice_item(rng, f"Open: {' '.join(text)}\nClose:", choices)


def json_closing(rng: Random, index: int, *, depth: int = 4) -> dict[str, Any]:
    """A JSON document cut off after its innermost value, and what closes it."""
    value: Any = record(rng)
    closing = "}"
    while len(closing) < depth:
        if rng.random() < 0.5:
            value, closing = [record(rng), value], f"{closing}]"
        else:
            value, closing = record(rng) | {rng.choice(("next", "parent", "details")): value}, f"{closing}}}"
    text = json.dumps(value)
    assert text.endswith(closing), "the innermost value comes last"
    others = ["".join(other) for other in itertools.product("}]", repeat=depth) if "".join(other) != closing]
    return choice_item(rng, text.removesuffix(closing), [closing, *rng.sample(others, 3)])


def _one_digit_off(number: int) -> list[int]:
    """Numbers of as many digits that differ in exactly one."""
    text = str(number)
    return [
        int(text[:place] + digit + text[place + 1 :])
        for place, old in enumerate(text)
        for digit in "0123456789"
        if digit != old and (digit != "0" or place > 0 or len(text) == 1)
    ]


def _differences(left: list[str], right: list[str]) -> int:
    return sum(one != other for one, other in zip(left, right, strict=True))
