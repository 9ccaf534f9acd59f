"""A model to evaluate: opened, with its tokenizer and size, and what will run it; checked against the reference."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from quantkit.arch import already_quantized
from quantkit.errors import EvaluationError, SourceError, UnsupportedModelError
from quantkit.evaluation.size import Size, measure_gguf, measure_size
from quantkit.formats.awq import open_awq
from quantkit.formats.checkpoint import Checkpoint, open_checkpoint
from quantkit.formats.dequantized import DequantizedCheckpoint
from quantkit.formats.gptq import open_gptq
from quantkit.formats.quantization_config import read_quantization
from quantkit.formats.source import resolve_source
from quantkit.runtime.models.families import read_spec
from quantkit.tokens import Tokenizer, load_tokenizer

BackendName = Literal["quantkit", "transformers", "bitsandbytes"]
AskedBackend = Literal["auto", "quantkit", "transformers"]

DEQUANTIZED: Mapping[str, Callable[[Checkpoint], DequantizedCheckpoint]] = {
    "GPTQ": open_gptq,
    "AWQ": open_awq,
}
COUNTED = {"compressed-tensors", "fp8", *DEQUANTIZED}  # formats whose weights can be counted from headers
_TOKENIZER_FIX = "evaluate against the model that the candidate was made from"


class Subject(NamedTuple):
    """A model that can be evaluated.

    name: what the user typed. checkpoint: of one that bitsandbytes makes, the original's. kind: how it is stored, as
    people call it. max_positions: None where the config does not say. notes: what the reader of figures should know.
    """

    name: str
    checkpoint: Checkpoint
    tokenizer: Tokenizer
    size: Size
    vocab_size: int
    max_positions: int | None
    backend: BackendName
    kind: str
    notes: tuple[str, ...] = ()


def open_subject(source: str, asked: AskedBackend, announce: Callable[[str], None]) -> Subject:
    """Resolve and open a checkpoint; headers and tokenizer only. Raises SourceError, UnsupportedModelError.

    announce: told before a download or a conversion.
    """
    stored = open_checkpoint(resolve_source(source, announce=announce))
    kind = _kind(source, stored)
    checkpoint, notes = stored, []
    if kind in DEQUANTIZED and asked != "transformers":
        checkpoint = DEQUANTIZED[kind](stored)
        notes.append(
            f"{source}: {kind} weights are dequantized, and computed with as a model of 16 or 32 bits"
        )
    if kind == "GGUF":
        notes.append(f"{source}: GGUF weights are converted to bf16, which rounds them once more")
    backend, reason = _choose_backend(source, checkpoint, asked)
    size, doubt = _measure(source, checkpoint, backend)
    return Subject(
        name=source,
        checkpoint=checkpoint,
        tokenizer=load_tokenizer(checkpoint.path),
        size=size,
        vocab_size=checkpoint.count("vocab_size"),
        max_positions=_max_positions(checkpoint),
        backend=backend,
        kind=kind,
        notes=(*notes, *reason, *doubt),
    )


def counted_like(subject: Subject, reference: Subject) -> Subject:
    """A candidate in a format whose weights cannot be counted has as many as the reference."""
    if subject.kind in COUNTED or already_quantized(subject.checkpoint.config) is None:
        return subject
    return subject._replace(size=subject.size._replace(num_weights=reference.size.num_weights))


def check_length(subject: Subject, length: int) -> None:
    """Raise EvaluationError if a window is longer than the model's positions."""
    positions = subject.max_positions
    if positions is not None and length > positions:
        problem = f"--length {length}: {subject.name} has {positions} positions"
        raise EvaluationError(problem, fix=f"use --length {positions} or less")


def check_comparable(reference: Subject, candidate: Subject, sample: str) -> None:
    """Raise EvaluationError unless both predict the same tokens and split text into them the same way.

    sample: text from the beginning of what will be evaluated.
    """
    if reference.vocab_size != candidate.vocab_size:
        raise EvaluationError(
            f"{reference.name} has a vocabulary of {reference.vocab_size} tokens, {candidate.name} one of "
            f"{candidate.vocab_size}: their predictions cannot be compared",
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


def prompt_note(reference: Subject, candidate: Subject) -> str | None:
    """Set if tasks reach the two as other tokens: each model's tokenizer adds what it adds when it is served."""
    ours, theirs = (each.tokenizer.backend("a")["input_ids"] for each in (reference, candidate))
    if ours == theirs:
        return None
    shown = (each.tokenizer.backend.decode(ids) for each, ids in ((reference, ours), (candidate, theirs)))
    before, after = map(repr, shown)
    return (
        f"{candidate.name}: its tokenizer makes {after} of 'a', the original's {before}: "
        "what that costs is part of its tasks' scores"
    )


def _kind(source: str, checkpoint: Checkpoint) -> str:
    method = already_quantized(checkpoint.config)
    if method is not None:
        return {"gptq": "GPTQ", "awq": "AWQ"}.get(method, method)
    if source.lower().endswith(".gguf"):
        return "GGUF"
    largest = max(checkpoint.tensors.values(), key=lambda info: info.num_bytes)
    return f"{8 * largest.dtype.itemsize}-bit"


def _choose_backend(
    source: str, checkpoint: Checkpoint, asked: AskedBackend
) -> tuple[BackendName, tuple[str, ...]]:
    """What runs it, and a note if that is not what was hoped for. Our runtime goes first: it is what serves."""
    if asked == "transformers":
        return asked, ()
    problem = _why_not_here(checkpoint)
    if problem is None:
        return "quantkit", ()
    if asked == "quantkit":
        raise problem
    return "transformers", (f"{source} runs through transformers, since here {problem.problem}",)


def _why_not_here(checkpoint: Checkpoint) -> UnsupportedModelError | SourceError | None:
    """Why our runtime has no such architecture or format. Raises SourceError for a config that is damaged."""
    try:
        read_spec(checkpoint)
    except UnsupportedModelError as error:
        return error
    try:
        read_quantization(checkpoint.config)
    except SourceError as error:
        return error
    return None


def _measure(source: str, checkpoint: Checkpoint, backend: BackendName) -> tuple[Size, tuple[str, ...]]:
    try:
        if source.lower().endswith(".gguf"):
            return measure_gguf(Path(source).expanduser(), checkpoint), ()
        return measure_size(checkpoint), ()
    except UnsupportedModelError as error:
        if backend == "quantkit":
            raise
        doubt = f"{source}: its bits per weight are not known ({error.problem})"
        return Size(0, 0, checkpoint.num_bytes), (doubt,)


def _max_positions(checkpoint: Checkpoint) -> int | None:
    config = checkpoint.text_config
    value = config.get("max_position_embeddings", config.get("n_positions"))
    return value if type(value) is int else None


def _tokenizer_mismatch(reference: Subject, candidate: Subject, finding: str) -> EvaluationError:
    problem = f"the tokenizers of {reference.name} and {candidate.name} differ: {finding}"
    return EvaluationError(problem, fix=_TOKENIZER_FIX)
