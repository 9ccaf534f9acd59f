"""What a candidate's figures do not say by themselves: the map, and the worst positions continued by both models."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.errors import EvaluationError
from quantkit.evaluation.positions import Spot, by_class, by_position, worst_spots
from quantkit.evaluation.report import DamageMap, WorstExample
from quantkit.evaluation.scores import WindowScores
from quantkit.evaluation.serving import LoadModel, Model, Setup
from quantkit.evaluation.subjects import Subject
from quantkit.evaluation.where import Advance, map_linears

# Windows of the map and their length: enough to tell linears apart, since all swaps are compared on the same positions.
MAP_TEXT = {"cpu": (2, 64), "cuda": (4, 256)}
CONTEXT_TOKENS, CONTINUATION_TOKENS = 40, 24


class Measured(NamedTuple):
    """A candidate, and how it did on every window. written: what it writes at its worst positions, `spots`."""

    subject: Subject
    scores: Sequence[WindowScores]
    spots: Sequence[Spot]
    written: Sequence[str]

    @property
    def kl_per_window(self) -> list[Tensor]:
        """At every position, float64 [T] each."""
        return [window.kl_T for window in self.scores]


def measure(
    candidate: Subject, scores: Sequence[WindowScores], windows: Sequence[Tensor], model: Model, examples: int
) -> Measured:
    """With `examples` of its worst positions, written on by the model that is still there."""
    spots = worst_spots(scores, examples)
    return Measured(candidate, scores, spots, _write(candidate, model, _texts(spots, windows)))


def draw_map(
    original: Subject,
    candidate: Measured,
    windows: Sequence[Tensor],
    device: torch.device,
    advance: Advance,
) -> DamageMap:
    """Damage by linear (on some of the windows), position and class of token.

    advance: told of swaps. Raises EvaluationError if both models together do not fit, and what `map_linears` does.
    """
    count, length = MAP_TEXT[device.type]
    few = [ids_T[:length] for ids_T in windows[:: max(1, len(windows) // count)][:count]]
    subject, kls = candidate.subject, candidate.kl_per_window
    for model in (original, subject):
        if model.backend != "quantkit":
            problem = f"{subject.name} has no map: {model.name} runs through {model.backend}"
            raise EvaluationError(problem, fix="leave --where away")
    try:
        linears = map_linears(original.checkpoint, subject.checkpoint, few, device, advance)
    except torch.OutOfMemoryError:
        problem = f"{subject.name} has no map: both models, in float32, are too large for {device}"
        raise EvaluationError(problem, fix="leave --where away, or use --device cpu") from None
    return DamageMap(
        windows=len(few),
        length=len(few[0]),
        linears=linears,
        by_position=by_position(kls),
        by_class=by_class(windows, kls, original.tokenizer.decode),
    )


def worst_examples(
    original: Subject,
    candidates: Sequence[Measured],
    windows: Sequence[Tensor],
    setup: Setup,
    load: LoadModel,
) -> list[tuple[WorstExample, ...]]:
    """Worst positions of each, with what the original in float32, loaded once, and the candidate write there."""
    texts = [_texts(candidate.spots, windows) for candidate in candidates]
    all_texts = [text for of_one in texts for text in of_one]
    if not all_texts:
        return [() for _ in candidates]
    references = iter(_write(original, load(original, setup.exact(original)), all_texts))
    decode = original.tokenizer.decode
    return [
        tuple(
            WorstExample(
                context=decode(text[-CONTEXT_TOKENS:].tolist()),
                reference=next(references),
                candidate=answer,
                kl=spot.kl,
            )
            for spot, text, answer in zip(candidate.spots, of_one, candidate.written, strict=True)
        )
        for candidate, of_one in zip(candidates, texts, strict=True)
    ]


def _texts(spots: Sequence[Spot], windows: Sequence[Tensor]) -> list[Tensor]:
    """What stands before the tokens that differ."""
    return [windows[spot.window][: spot.position + 1] for spot in spots]


def _write(subject: Subject, model: Model, texts: Sequence[Tensor]) -> list[str]:
    """Greedy continuations, none beyond the model's positions."""
    written = []
    for text in texts:
        room = CONTINUATION_TOKENS if subject.max_positions is None else subject.max_positions - len(text)
        written.append(subject.tokenizer.decode(model.greedy(text, min(CONTINUATION_TOKENS, room))))
    return written
