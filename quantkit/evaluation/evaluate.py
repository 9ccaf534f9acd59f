"""Measure what candidates lost against their original, on the same text, in the same runtime.

One model is in memory at a time, and one window of logits: the original runs first and its predictions are kept
on disk; then each candidate runs alone.
"""

from collections.abc import Sequence
from itertools import accumulate, takewhile
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from quantkit.env import cache_dir
from quantkit.errors import EvaluationError
from quantkit.evaluation.cache import TensorCache
from quantkit.evaluation.gates import NO_GATES, Gates, check_gates
from quantkit.evaluation.reference import LoadModel, Reference
from quantkit.evaluation.report import CandidateReport, DataInfo, EvalReport, ReferenceReport
from quantkit.evaluation.scores import NotFiniteError, WindowScores, perplexity, score_window, summarise
from quantkit.evaluation.subjects import (
    Subject,
    check_comparable,
    check_length,
    open_subject,
    vocabulary_mismatch,
)
from quantkit.text import Documents, load_documents
from quantkit.tokens import tokenize, windows as read_windows

SAMPLE_CHARS = 1 << 16  # of text that all tokenizers have to split alike


class Listener(Protocol):
    """Hears what is going on; a step is one window through one model."""

    def say(self, line: str, /) -> None:
        """Something that the user should know; also in the report's notes."""
        ...

    def step(self, label: str, done: int, total: int, /) -> None:
        """`done` of `total` steps of the whole evaluation are finished, and `label` is being run."""
        ...


class Silent:
    """Hears nothing."""

    def say(self, line: str) -> None:
        """Ignore the line: it is in the report."""

    def step(self, label: str, done: int, total: int) -> None:
        """Ignore progress."""


class _Work:
    """Steps done and to do, and the notes so far."""

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self.notes: list[str] = []
        self.done = self.total = 0

    def say(self, line: str) -> None:
        self.notes.append(line)
        self.listener.say(line)

    def advance(self, label: str, steps: int) -> None:
        self.done += steps
        self.listener.step(label, self.done, max(self.done, self.total))


SILENT = Silent()


def evaluate(
    reference: str | Path,
    candidates: Sequence[str | Path],
    *,
    data: str = "docs",
    windows: int = 24,
    length: int = 512,
    gates: Gates = NO_GATES,
    listener: Listener = SILENT,
    load: LoadModel | None = None,
    cache: TensorCache | None = None,
) -> EvalReport:
    """Perplexity, KL divergence and top-1 agreement of candidates against their original, in float32 on CPU.

    reference, candidates: anything that is a SOURCE. data: a SPEC of text, of which `windows` windows of `length`
    tokens, spread evenly, are run. load: runs a checkpoint (default: this package's runtime). cache: where the
    reference's predictions are kept (default: under QUANTKIT_CACHE). A candidate whose logits are not finite
    gets a row without figures; the others go on. Memory: one model and one window's logits, whatever the text.
    Raises EvaluationError if two checkpoints cannot be compared, and SourceError, TextError,
    UnsupportedModelError.
    """
    _check_request(candidates, windows, length)
    work = _Work(listener)
    original = open_subject(str(reference))
    others = [open_subject(str(candidate)) for candidate in candidates]
    documents = load_documents(data)
    _check_subjects(original, others, documents, length)
    tokens = tokenize(documents, original.tokenizer)
    batch = list(read_windows(tokens, windows, length))
    store = cache or TensorCache(cache_dir() / "reference")
    run = load or _runtime_loader()
    source = Reference(
        original.checkpoint.path, original.checkpoint.content_hash(), original.dtype, run, store, work.say
    )
    work.total = source.claim(batch) + len(others) * windows
    reference_ppl, noise_floor = _run_reference(source, batch, original.name, work)
    results = tuple(
        _run_candidate(other, original.name, source, batch, run, reference_ppl, noise_floor, work)
        for other in others
    )
    return EvalReport(
        reference=ReferenceReport(
            path=original.name,
            content_hash=source.content_hash,
            dtype=str(source.dtype).removeprefix("torch."),
            ppl=reference_ppl,
            kl_noise_floor=noise_floor,
            bits_per_weight=original.size.bits_per_weight,
            bytes=original.size.bytes,
        ),
        data=DataInfo(spec=data, tokens=len(tokens), hash=tokens.text_hash, windows=windows, length=length),
        candidates=results,
        gates=check_gates(gates, results),
        notes=tuple(work.notes),
    )


def _run_reference(source: Reference, batch: list[Tensor], name: str, work: _Work) -> tuple[float, float]:
    """Fill the cache; returns perplexity and noise floor."""
    log_probs, noise = [], []
    for ids_T in batch:
        missing = source.claim([ids_T])
        log_probs.append(source.window(ids_T).log_prob_T)
        work.advance(f"{name} in float32", missing - source.claim([ids_T]))
    source.release()
    for ids_T in batch:
        missing = source.claim([ids_T])
        noise.append(source.noise_kl(ids_T))
        work.advance(f"{name} in its own dtype", missing - source.claim([ids_T]))
    source.release()
    return perplexity(log_probs), float(torch.cat(noise).mean())


def _run_candidate(
    candidate: Subject,
    reference_name: str,
    source: Reference,
    batch: list[Tensor],
    run: LoadModel,
    reference_ppl: float,
    noise_floor: float,
    work: _Work,
) -> CandidateReport:
    model = run(candidate.checkpoint.path, dtype=torch.float32)
    scores: list[WindowScores] = []
    size = candidate.size
    for index, ids_T in enumerate(batch):
        exact = source.window(ids_T)
        logits_TV = model.logits(ids_T)
        sizes = exact.logits.codes_TV.shape[1], logits_TV.shape[1]
        if sizes[0] != sizes[1]:
            raise vocabulary_mismatch(reference_name, sizes[0], candidate.name, sizes[1])
        try:
            scores.append(score_window(exact, logits_TV, ids_T))
        except NotFiniteError as error:
            failure = f"produces {error} of window {index}"
            work.say(f"{candidate.name} {failure}: it is broken and gets no figures")
            work.advance(candidate.name, len(batch) - index)
            return CandidateReport(
                path=candidate.name,
                bits_per_weight=size.bits_per_weight,
                bytes=size.bytes,
                damage=None,
                failure=failure,
            )
        work.advance(candidate.name, 1)
    damage = summarise(scores, reference_ppl, noise_floor)
    return CandidateReport(
        path=candidate.name, bits_per_weight=size.bits_per_weight, bytes=size.bytes, damage=damage
    )
