"""What a task file of `eval/probes/` refers to: its items, made by a generator."""

from collections.abc import Callable, Mapping
from random import Random
from typing import Any

import datasets

from quantkit.errors import EvaluationError
from quantkit.evaluation.probes import genres, prose, recall, symbols

Item = dict[str, Any]

# An item from a random source of its own and its number, so that the first N of any number are the same N.
GENERATORS: Mapping[str, Callable[..., Item]] = {
    "arithmetic": symbols.arithmetic,
    "brackets": symbols.brackets,
    "cloze": prose.cloze,
    "code_genre": genres.code,
    "continuation": prose.continuation,
    "copying": recall.copying,
    "dialogue_genre": genres.dialogue,
    "json_closing": symbols.json_closing,
    "json_genre": genres.json_lines,
    "needle": recall.needle,
    "opening": prose.opening,
    "prose_genre": genres.prose,
    "table_genre": genres.table,
}
NUM_EXAMPLES = 8  # to choose few-shot examples from


def load(
    *,
    generator: str,
    num_items: int,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    **metadata: Any,
) -> dict[str, datasets.Dataset]:
    """The splits `test` and `examples` (for few-shot prompts) of a probe, as lm-eval's `custom_dataset`.

    settings: keyword arguments of the generator. metadata: the task's, which lm-eval passes along.
    """
    if generator not in GENERATORS:
        raise EvaluationError(f"no probe generator named {generator}", fix=f"one of {', '.join(GENERATORS)}")
    sizes = {"test": num_items, "examples": NUM_EXAMPLES}
    return {
        split: datasets.Dataset.from_list(make_items(generator, size, f"{split}:{seed}", settings or {}))
        for split, size in sizes.items()
    }


def make_items(generator: str, num_items: int, seed: str, settings: Mapping[str, Any]) -> list[Item]:
    """Items of a generator: the same for the same arguments, on any machine with the same documentation."""
    make = GENERATORS[generator]
    return [make(Random(f"{generator}:{seed}:{index}"), index, **settings) for index in range(num_items)]
