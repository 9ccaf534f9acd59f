"""Measure what candidates lost against their original, on the same text, in the same runtime.

One model is in memory at a time, and one window of logits: the original runs first and its predictions are kept
on disk; then each candidate runs alone.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from quantkit.env import cache_dir
from quantkit.errors import EvaluationError
from quantkit.evaluation.cache import TensorCache
from quantkit.evaluation.gates import NO_GATES, Gates, check_gates
from quantkit.evaluation.reference import LoadModel, Reference
from quantkit.evaluation.report import CandidateReport, Damage, DataInfo, EvalReport, ReferenceReport
from quantkit.evaluation.scores import NotFiniteError, perplexity, score_window, summarise
from quantkit.evaluation.subjects import (
    Subject,
    check_comparable,
    check_length,
    open_subject,
    vocabulary_mismatch,
)
from quantkit.runtime.load import load_model
from quantkit.text import load_documents
from quantkit.tokens import read_windows, tokenize

SAMPLE_CHARS = 1 << 16  # of text that all tokenizers have to split alike


class Listener(Protocol):
    """Hears what is going on; a step is one window through one model."""

    def say(self, line: str, /) -> None:
        """Something that the user should know."""
        ...

    def step(self, label: str, done: int, total: int, /) -> None:
        """`done` of `total` steps of the whole evaluation are finished; the last was one of `label`."""
        ...


class Silent:
    """Hears nothing; what matters is in the report's notes."""

    def say(self, line: str, /) -> None:
        """Ignore the line."""

    def step(self, label: str, done: int, total: int, /) -> None:
        """Ignore progress."""


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
    load: LoadModel = load_model,
    cache: TensorCache | None = None,
) -> EvalReport:
    """Perplexity, KL divergence and top-1 agreement of candidates against their original, in float32 on CPU.

    reference, candidates: anything that is a SOURCE. data: a SPEC of text, of which `windows` windows of `length`
    tokens, spread evenly, are run. load: how a checkpoint is run (default: this package's runtime). cache: where
    the reference's predictions are kept (default: under QUANTKIT_CACHE). A candidate whose logits are not finite
    gets a row without figures and the report does not pass; the others go on.
    Memory: one model and one window's logits, whatever the amount of text. Raises EvaluationError if two
    checkpoints cannot be compared; SourceError, TextError, UnsupportedModelError as reading them does.
    """
    _check_request(candidates, windows, length)
    original, *others = [open_subject(str(source), listener.say) for source in (reference, *candidates)]
    documents = load_documents(data)
    _check_subjects(original, others, documents, length)
    with tokenize(documents, original.tokenizer) as tokens:
        text = DataInfo(spec=data, tokens=len(tokens), hash=tokens.text_hash, windows=windows, length=length)
        run = _Run(list(read_windows(tokens, windows, length)), load, listener)
    source = Reference(original.checkpoint, load, cache or TensorCache(cache_dir() / "reference"), run.say)
    run.plan(source, len(others))
    baseline = _run_reference(original, source, run)
    results = tuple(_run_candidate(candidate, baseline, run) for candidate in others)
    return EvalReport(
        reference=_reference_report(original, baseline),
        data=text,
        candidates=results,
        gates=check_gates(gates, results),
        notes=tuple(run.notes),
    )


class _Run:
    """What every part needs: the windows, how to load a model, and whom to tell how far we are."""

    def __init__(self, windows: list[Tensor], load: LoadModel, listener: Listener) -> None:
        self.windows = windows
        self.load = load
        self.notes: list[str] = []
        self._listener = listener
        self._done = self._total = 0

    def plan(self, source: Reference, num_candidates: int) -> None:
        """Count the steps: what is kept on disk is none."""
        self._total = source.claim(self.windows) + num_candidates * len(self.windows)

    def say(self, line: str) -> None:
        """Tell the user, and note it for the report."""
        self.notes.append(line)
        self._listener.say(line)

    def advance(self, label: str, steps: int = 1) -> None:
        """Count steps as done; an entry of the cache that proved damaged is one more than planned."""
        self._done += steps
        self._total = max(self._total, self._done)
        self._listener.step(label, self._done, self._total)


class _Baseline(NamedTuple):
    """The reference as run: where its predictions come from, and its own figures."""

    name: str
    source: Reference
    ppl: float
    noise_floor: float


def _check_request(candidates: Sequence[str | Path], windows: int, length: int) -> None:
    if not candidates:
        raise EvaluationError(
            "no candidate to evaluate", fix="name at least one: quantkit eval REFERENCE CANDIDATE"
        )
    if windows < 1:
        raise EvaluationError(f"--windows {windows}: there has to be one", fix="use --windows 24")
    if length < 2:
        raise EvaluationError(f"--length {length}: too short to predict a next token", fix="use --length 512")


def _check_subjects(original: Subject, others: list[Subject], documents: Iterable[str], length: int) -> None:
    """Everything that can be refused before hours of work."""
    sample = ""
    for document in documents:
        sample += document[:SAMPLE_CHARS] + "\n\n"
        if len(sample) >= SAMPLE_CHARS:
            break
    check_length(original, length)
    for candidate in others:
        check_length(candidate, length)
        check_comparable(original, candidate, sample)


def _run_reference(original: Subject, source: Reference, run: _Run) -> _Baseline:
    """Have every window's predictions on disk, and the original's own figures."""
    log_probs, noise = [], []
    for ids_T in run.windows:
        was_kept = source.is_kept(ids_T, torch.float32)
        log_probs.append(source.window(ids_T).log_prob_T)
        run.advance(f"{original.name}, float32", not was_kept)
    source.release()
    for ids_T in run.windows:
        was_kept = source.is_kept(ids_T, source.dtype)
        noise.append(source.noise_kl(ids_T))
        run.advance(f"{original.name}, {source.dtype_name}", not was_kept)
    source.release()
    return _Baseline(original.name, source, perplexity(log_probs), float(torch.cat(noise).mean()))


def _run_candidate(candidate: Subject, baseline: _Baseline, run: _Run) -> CandidateReport:
    model = run.load(candidate.checkpoint.path, dtype=torch.float32)
    scores = []
    for index, ids_T in enumerate(run.windows):
        window = baseline.source.window(ids_T)
        logits_TV = model.logits(ids_T)
        if logits_TV.shape[1] != window.vocab_size:
            raise vocabulary_mismatch(baseline.name, window.vocab_size, candidate.name, logits_TV.shape[1])
        try:
            scores.append(score_window(window, logits_TV, ids_T))
        except NotFiniteError as error:
            failure = f"produces {error} of window {index}"
            run.say(f"{candidate.name} {failure}: it is broken and gets no figures")
            run.advance(candidate.name, len(run.windows) - index)
            return _candidate_report(candidate, None, failure)
        run.advance(candidate.name)
    return _candidate_report(candidate, summarise(scores, baseline.ppl, baseline.noise_floor), None)


def _reference_report(original: Subject, baseline: _Baseline) -> ReferenceReport:
    return ReferenceReport(
        path=original.name,
        content_hash=baseline.source.content_hash,
        dtype=baseline.source.dtype_name,
        ppl=baseline.ppl,
        kl_noise_floor=baseline.noise_floor,
        bits_per_weight=original.size.bits_per_weight,
        bytes=original.size.bytes,
    )


def _candidate_report(candidate: Subject, damage: Damage | None, failure: str | None) -> CandidateReport:
    return CandidateReport(
        path=candidate.name,
        bits_per_weight=candidate.size.bits_per_weight,
        bytes=candidate.size.bytes,
        damage=damage,
        failure=failure,
    )
