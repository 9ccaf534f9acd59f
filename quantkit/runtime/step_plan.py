"""What one step computes, as the scheduler decided it: rows of sequences, no tensors."""

from collections.abc import Iterator
from typing import NamedTuple

from quantkit.runtime.sequence import Sequence

NONE = range(0)


class Scheduled(NamedTuple):
    """Tokens start … start + num_new − 1 of a sequence, in one step.

    A token that the host does not know yet is the row's last one on the device. With a new `generation` the row has a
    new owner, or its owner new blocks. samples: the last token is among them, so the step samples the next one.
    scored: those of the tokens whose targets' log probabilities are wanted.
    """

    sequence: Sequence
    row: int
    start: int
    num_new: int
    samples: bool
    generation: int
    scored: range


class StepPlan(NamedTuple):
    """Rows with one new token first, `num_decode` of them; each of those samples."""

    rows: tuple[Scheduled, ...]
    num_decode: int

    @classmethod
    def of(cls, decode: list[Scheduled], chunks: list[Scheduled]) -> "StepPlan":
        """decode: rows of one token; chunks: of one or more."""
        single = [row for row in chunks if row.num_new == 1]
        longer = [row for row in chunks if row.num_new > 1]
        return cls((*decode, *single, *longer), len(decode) + len(single))

    def sampling(self) -> Iterator[Sequence]:
        """The sequences that get a token, in the order of rows."""
        return (row.sequence for row in self.rows if row.samples)


def schedule_tokens(sequence: Sequence, num_new: int) -> Scheduled:
    """The next tokens of a running sequence."""
    assert sequence.row is not None, "what runs has a row"
    start = sequence.num_computed
    samples = start + num_new == sequence.num_tokens
    scored = NONE
    if sequence.targets:
        scored = range(max(start, sequence.num_scored), min(start + num_new, len(sequence.targets)))
    return Scheduled(sequence, sequence.row, start, num_new, samples, sequence.generation, scored)
