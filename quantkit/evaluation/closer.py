"""What a candidate's figures do not say by themselves: the map, and the worst positions continued by both models."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.errors import EvaluationError
from quantkit.evaluation.positions import by_class, by_position, worst_spots
from quantkit.evaluation.report import DamageMap, WorstExample
from quantkit.evaluation.scores import WindowScores
from quantkit.evaluation.serving import LoadModel, Serving, Setup
from quantkit.evaluation.subjects import Subject
from quantkit.evaluation.where import Advance, map_linears

# Windows of the map and their length: enough to tell linears apart, since all swaps are compared on the same positions.
MAP_TEXT = {"cpu": (2, 64), "cuda": (4, 256)}
CONTEXT_TOKENS, CONTINUATION_TOKENS = 40, 24


class Measured(NamedTuple):
    """A candidate, and how it did on every window."""

    subject: Subject
    scores: Sequence[WindowScores]

    @property
    def kl_per_window(self) -> list[Tensor]:
        """At every position, float64 [T] each."""
        return [window.kl_T for window in self.scores]


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


def continue_worst(
    original: Subject,
    candidates: Sequence[Measured],
    windows: Sequence[Tensor],
    setup: Setup,
    load: LoadModel,
    count: int,
) -> list[tuple[WorstExample, ...]]:
    """The `count` worst positions of each candidate, with what the original in float32 and the candidate write there.

    Models are loaded one after another, the original last.
    """
    spots = [worst_spots(candidate.scores, count) for candidate in candidates]
    prompts = [[windows[spot.window][: spot.position + 1] for spot in chosen] for chosen in spots]
    written = [
        _write(subject, setup.candidate(subject), texts, load)
        for (subject, _), texts in zip(candidates, prompts, strict=True)
    ]
    all_prompts = [text for texts in prompts for text in texts]
    references = iter(_write(original, setup.exact(original), all_prompts, load))
    decode = original.tokenizer.decode
    return [
        tuple(
            WorstExample(
                context=decode(text[-CONTEXT_TOKENS:].tolist()),
                reference=next(references),
                candidate=answer,
                kl=spot.kl,
            )
            for spot, text, answer in zip(*columns, strict=True)
        )
        for columns in zip(spots, prompts, written, strict=True)
    ]


def _write(subject: Subject, serving: Serving, prompts: Sequence[Tensor], load: LoadModel) -> list[str]:
    """Greedy continuations, none beyond the model's positions."""
    if not prompts:
        return []
    model = load(subject, serving)
    written = []
    for text in prompts:
        room = CONTINUATION_TOKENS if subject.max_positions is None else subject.max_positions - len(text)
        written.append(subject.tokenizer.decode(model.greedy(text, min(CONTINUATION_TOKENS, room))))
    return written
