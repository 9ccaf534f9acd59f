"""A checkpoint to evaluate: opened, with its tokenizer and size, and checked against the reference."""

from collections.abc import Callable
from typing import NamedTuple

from quantkit.errors import EvaluationError
from quantkit.evaluation.size import Size, measure_size
from quantkit.formats.checkpoint import Checkpoint, open_checkpoint
from quantkit.formats.quantization_config import read_quantization
from quantkit.formats.source import resolve_source
from quantkit.runtime.models.families import read_spec
from quantkit.runtime.models.spec import DecoderSpec
from quantkit.tokens import Tokenizer, load_tokenizer

_TOKENIZER_FIX = "evaluate against the model that the candidate was made from"


class Subject(NamedTuple):
    """`name` is what the user typed."""

    name: str
    checkpoint: Checkpoint
    spec: DecoderSpec
    tokenizer: Tokenizer
    size: Size


def open_subject(source: str, announce: Callable[[str], None]) -> Subject:
    """Resolve and open a checkpoint; headers and tokenizer only. Raises SourceError, UnsupportedModelError.

    announce: told before a download or a conversion.
    """
    checkpoint = open_checkpoint(resolve_source(source, announce=announce))
    spec = read_spec(checkpoint)  # refuses now what could not be run later
    read_quantization(checkpoint.config)
    return Subject(source, checkpoint, spec, load_tokenizer(checkpoint.path), measure_size(checkpoint))


def check_length(subject: Subject, length: int) -> None:
    """Raise EvaluationError if a window is longer than the model's positions."""
    positions = subject.spec.max_positions
    if length > positions:
        problem = f"--length {length}: {subject.name} has {positions} positions"
        raise EvaluationError(problem, fix=f"use --length {positions} or less")


def check_comparable(reference: Subject, candidate: Subject, sample: str) -> None:
    """Raise EvaluationError unless both predict the same tokens and split text into them the same way.

    sample: text from the beginning of what will be evaluated.
    """
    sizes = reference.spec.vocab_size, candidate.spec.vocab_size
    if sizes[0] != sizes[1]:
        raise EvaluationError(
            f"{reference.name} has a vocabulary of {sizes[0]} tokens, {candidate.name} one of {sizes[1]}: "
            "their predictions cannot be compared",
            fix=_TOKENIZER_FIX,
        )
    ours, theirs = reference.tokenizer.vocabulary(), candidate.tokenizer.vocabulary()
    moved = next(
        (token for token in sorted(ours.keys() & theirs.keys()) if ours[token] != theirs[token]), None
    )
    if moved is not None:
        finding = f"token {moved!r} is {ours[moved]} in the first and {theirs[moved]} in the second"
        raise _tokenizer_mismatch(reference, candidate, finding)
    if reference.tokenizer.encode(sample).ids != candidate.tokenizer.encode(sample).ids:
        raise _tokenizer_mismatch(reference, candidate, "they split the same text differently")


def _tokenizer_mismatch(reference: Subject, candidate: Subject, finding: str) -> EvaluationError:
    problem = f"the tokenizers of {reference.name} and {candidate.name} differ: {finding}"
    return EvaluationError(problem, fix=_TOKENIZER_FIX)
