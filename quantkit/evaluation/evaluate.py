"""Measure what candidates lost against their original, on the same text, in the same runtime.

One model is in memory at a time, and some rows of logits: the original runs first and its predictions are kept on
disk; then each candidate runs alone.
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
from quantkit.evaluation.reference import Reference
from quantkit.evaluation.report import CandidateReport, Damage, DataInfo, EvalReport, ReferenceReport
from quantkit.evaluation.scores import NotFiniteError, perplexity, score_window, summarise
from quantkit.evaluation.serving import LoadModel, Serving, Setup, check_serving, load_served
from quantkit.evaluation.subjects import Subject, check_comparable, check_length, open_subject
from quantkit.evaluation.suites import plan_suite
from quantkit.runtime.settings import DtypeName, EngineSettings, KVCacheDtypeName
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
    data: str | None = None,
    windows: int | None = None,
    length: int | None = None,
    device: str | None = None,
    dtype: DtypeName | None = None,
    kv_cache_dtype: KVCacheDtypeName = "auto",
    suite: str | Path | None = None,
    gates: Gates = NO_GATES,
    listener: Listener = SILENT,
    load: LoadModel = load_served,
    cache: TensorCache | None = None,
) -> EvalReport:
    """Perplexity, KL divergence and top-1 agreement of candidates, as they are served, against the original in float32.

    reference, candidates: anything that is a SOURCE. data: a SPEC of text (default: docs), of which `windows` windows
    (24) of `length` tokens (512), spread evenly, are run. suite: a shipped suite's name, or a YAML file, that says
    these, what else to run, and gates; what is given beside it wins. device: None is a GPU if there is one. dtype: of
    the candidates; None is on a GPU each one's own, with all kernels, on a CPU float32. kv_cache_dtype: of the
    candidates; auto: as each says. load: how a checkpoint is run (default: this package's runtime). cache: where the
    reference's predictions are kept (default: under QUANTKIT_CACHE). A candidate whose logits are not finite gets a
    row without figures and the report does not pass; the others go on.
    Memory: one model, a step's hidden states and 2^26 logits, whatever the amount of text. Raises EvaluationError if
    two checkpoints cannot be compared; GenerationError for a device that is not there, MemoryPlanError if it is too
    small; SourceError, TextError, UnsupportedModelError, SchemeError as reading and loading do.
    """
    asked = plan_suite(suite, data=data, windows=windows, length=length, gates=gates)
    data, windows, length = asked.data, asked.windows, asked.length
    _check_request(candidates, windows, length)
    setup = Setup.of(EngineSettings(device=device, dtype=dtype, kv_cache_dtype=kv_cache_dtype), length)
    original, *others = [open_subject(str(source), listener.say) for source in (reference, *candidates)]
    documents = load_documents(data)
    _check_subjects(original, others, documents, setup)
    with tokenize(documents, original.tokenizer) as tokens:
        text = DataInfo(spec=data, tokens=len(tokens), hash=tokens.text_hash, windows=windows, length=length)
        run = _Run(list(read_windows(tokens, windows, length)), setup, load, listener)
    source = Reference(
        original.checkpoint, setup, load, cache or TensorCache(cache_dir() / "reference"), run.say
    )
    run.plan(source, len(others))
    baseline = _run_reference(original, source, run)
    results = tuple(_run_candidate(candidate, baseline, run) for candidate in others)
    return EvalReport(
        reference=_reference_report(original, baseline),
        data=text,
        device=source.exact.device_name,
        kv_cache_dtype=kv_cache_dtype,
        candidates=results,
        gates=tuple(found for one in results for found in check_gates(asked.gates_of(one.path), one)),
        notes=tuple(run.notes),
    )


class _Run:
    """What every part needs: the windows, how to load and run a model, and whom to tell how far we are."""

    def __init__(self, windows: list[Tensor], setup: Setup, load: LoadModel, listener: Listener) -> None:
        self.windows = windows
        self.setup = setup
        self.load = load
        self.notes: list[str] = []
        self._listener = listener
        self._done = self._total = 0

    def plan(self, source: Reference, num_candidates: int) -> None:
        """Count the steps: what is kept on disk is none."""
        self._total = source.claim(self.windows) + num_candidates * len(self.windows)

    def kept(self, source: Reference, serving: Serving) -> list[bool]:
        """For which windows nothing has to be run."""
        return [source.is_kept(window, serving) for window in self.windows]

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


def _check_subjects(original: Subject, others: list[Subject], documents: Iterable[str], setup: Setup) -> None:
    """Everything that can be refused before hours of work."""
    sample = ""
    for document in documents:
        sample += document[:SAMPLE_CHARS] + "\n\n"
        if len(sample) >= SAMPLE_CHARS:
            break
    check_length(original, setup.length)
    for candidate in others:
        check_length(candidate, setup.length)
        check_comparable(original, candidate, sample)
        check_serving(candidate.checkpoint, setup.candidate(candidate.checkpoint))


def _run_reference(original: Subject, source: Reference, run: _Run) -> _Baseline:
    """Have every window's predictions on disk, and the original's own figures."""
    log_probs, noise = [], []
    for was_kept, window in zip(run.kept(source, source.exact), source.windows(run.windows), strict=True):
        log_probs.append(window.log_prob_T)
        run.advance(f"{original.name}, float32", not was_kept)
    source.release()
    for was_kept, kl_T in zip(run.kept(source, source.rounded), source.noise_kls(run.windows), strict=True):
        noise.append(kl_T)
        run.advance(f"{original.name}, {source.rounded.dtype_name}", not was_kept)
    source.release()
    return _Baseline(source, perplexity(log_probs), float(torch.cat(noise).mean()))


def _run_candidate(candidate: Subject, baseline: _Baseline, run: _Run) -> CandidateReport:
    serving = run.setup.candidate(candidate.checkpoint)
    model = run.load(candidate.checkpoint, serving)
    predictions = model.predictions(run.windows, step_tokens=serving.step_tokens)
    scores = []
    for index, (ids_T, logits) in enumerate(zip(run.windows, predictions, strict=True)):
        try:
            scores.append(score_window(baseline.source.window(ids_T), logits, ids_T))
        except NotFiniteError as error:
            failure = f"produces {error} of window {index}"
            run.say(f"{candidate.name} {failure}: it is broken and gets no figures")
            run.advance(candidate.name, len(run.windows) - index)
            return _candidate_report(candidate, serving, None, failure)
        run.advance(candidate.name)
    damage = summarise(scores, baseline.ppl, baseline.noise_floor)
    return _candidate_report(candidate, serving, damage, None)


def _reference_report(original: Subject, baseline: _Baseline) -> ReferenceReport:
    return ReferenceReport(
        path=original.name,
        content_hash=baseline.source.content_hash,
        dtype=baseline.source.rounded.dtype_name,
        ppl=baseline.ppl,
        kl_noise_floor=baseline.noise_floor,
        bits_per_weight=original.size.bits_per_weight,
        bytes=original.size.bytes,
    )


def _candidate_report(
    candidate: Subject, serving: Serving, damage: Damage | None, failure: str | None
) -> CandidateReport:
    return CandidateReport(
        path=candidate.name,
        dtype=serving.dtype_name,
        kernels=serving.kernels,
        bits_per_weight=candidate.size.bits_per_weight,
        bytes=candidate.size.bytes,
        damage=damage,
        failure=failure,
    )
