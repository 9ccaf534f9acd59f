"""Measure what candidates lost against their original, on the same text, in the same runtime.

One model is in memory at a time, and some rows of logits: the original runs first and its predictions are kept on
disk; then each candidate runs alone.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from quantkit.env import cache_dir
from quantkit.errors import EvaluationError, QuantkitError
from quantkit.evaluation.backends import load_subject
from quantkit.evaluation.cache import TensorCache
from quantkit.evaluation.candidates import Broken, open_candidates, open_reference
from quantkit.evaluation.closer import Measured, draw_map, measure, worst_examples
from quantkit.evaluation.environment import describe_environment
from quantkit.evaluation.gates import NO_GATES, Gates, check_gates
from quantkit.evaluation.positions import histogram
from quantkit.evaluation.reference import Reference
from quantkit.evaluation.report import CandidateReport, Damage, DataInfo, EvalReport, ReferenceReport
from quantkit.evaluation.scores import NotFiniteError, perplexity, score_window, summarise
from quantkit.evaluation.serving import LoadModel, Serving, Setup
from quantkit.evaluation.subjects import AskedBackend, Subject, prompt_note
from quantkit.evaluation.suites import Suite, plan_suite
from quantkit.evaluation.tasks import TaskResult, TaskSession, compare_all
from quantkit.runtime.settings import DtypeName, EngineSettings, KVCacheDtypeName
from quantkit.text import load_documents
from quantkit.tokens import read_windows, tokenize


class Listener(Protocol):
    """Hears what is going on; a step is one window through one model."""

    def say(self, line: str, /) -> None:
        """Something that the user should know."""
        ...

    def step(self, label: str, done: int, total: int, unit: str = "windows", /) -> None:
        """`done` of `total` are finished, the last was one of `label`: of all windows, or of the requests of a task."""
        ...


class Silent:
    """Hears nothing; what matters is in the report's notes."""

    def say(self, line: str, /) -> None:
        """Ignore the line."""

    def step(self, label: str, done: int, total: int, unit: str = "windows", /) -> None:
        """Ignore progress."""


SILENT = Silent()


def evaluate(
    reference: str | Path,
    candidates: Sequence[str | Path] | str | Path,
    *,
    data: str | None = None,
    windows: int | None = None,
    length: int | None = None,
    device: str | None = None,
    dtype: DtypeName | None = None,
    kv_cache_dtype: KVCacheDtypeName = "auto",
    backend: AskedBackend = "auto",
    where: bool = False,
    examples: int = 0,
    tasks: Sequence[str] | str = (),
    limit: int | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    samples: str | Path | None = None,
    suite: str | Path | None = None,
    gates: Gates = NO_GATES,
    listener: Listener = SILENT,
    load: LoadModel = load_subject,
    cache: TensorCache | None = None,
) -> EvalReport:
    """Perplexity, KL divergence and top-1 agreement of candidates, as they are served, against the original in float32.

    reference: anything that is a SOURCE. candidates: likewise, GPTQ and AWQ checkpoints too, or "bnb:nf4" and
    "bnb:int8", which are made from the reference. suite: a shipped suite's name, or a YAML file, that says text,
    tasks, map and gates; what is given beside it wins. data: a SPEC of text (default: docs), of which `windows`
    windows (24) of `length` tokens (512), spread evenly, are run. device: None is a GPU if there is one. dtype: of
    the candidates; None is on a GPU each one's own, with all kernels, on a CPU float32. kv_cache_dtype: of the
    candidates; auto: as each says. backend: what runs the models; auto: this package's runtime, or transformers where
    it lacks an architecture or a format. where: map the damage of each to linears, positions and kinds of tokens.
    examples: so many of the worst positions are continued by both models. tasks: names of lm-eval's, asked of the
    original too, in the dtype of candidates; limit, num_fewshot, apply_chat_template: as lm-eval has them; samples:
    the folder where answers are logged and found again. load: how a model is run. cache: where the reference's
    predictions are kept (default: under QUANTKIT_CACHE).
    A candidate whose logits are not finite, or one of several that cannot be opened, compared or run, gets a row
    without figures and the report does not pass; the others go on.
    Memory: one model, a step's hidden states and 2^26 logits, whatever the amount of text. Raises, for the reference
    or the only candidate, EvaluationError if they cannot be compared; GenerationError for a device that is not there,
    MemoryPlanError if it is too small; SourceError, UnsupportedModelError, SchemeError as reading and loading do;
    TextError for the text.
    """
    candidates = _names(candidates)
    asked = plan_suite(
        suite,
        data=data,
        windows=windows,
        length=length,
        where=where or None,
        tasks=[tasks] if isinstance(tasks, str) else tasks,
        limit=limit,
        num_fewshot=num_fewshot,
        gates=gates,
    )
    data, windows, length = asked.data, asked.windows, asked.length
    _check_request(candidates, windows, length, backend)
    remarks: list[str] = []
    session = _session(asked, samples, apply_chat_template, listener, remarks)
    if tasks and session is not None:
        asked = asked.limited_to(session.names | gates.tasks.keys())
    setup = Setup.of(EngineSettings(device=device, dtype=dtype, kv_cache_dtype=kv_cache_dtype), length)
    original = open_reference(str(reference), backend, setup, listener.say)
    documents = load_documents(data)
    opened = open_candidates(
        candidates, original, documents, backend=backend, setup=setup, announce=listener.say
    )
    with tokenize(documents, original.tokenizer) as tokens:
        text = DataInfo(spec=data, tokens=len(tokens), hash=tokens.text_hash, windows=windows, length=length)
        run = _Run(list(read_windows(tokens, windows, length)), setup, load, listener, examples)
    source = Reference(original, setup, load, cache or TensorCache(cache_dir() / "reference"), run.say)
    run.plan(source, sum(isinstance(candidate, Subject) for candidate in opened))
    run.begin(original, *opened)
    if unmatched := asked.unmatched(candidates):
        run.say(f"the suite's gates of {', '.join(unmatched)} are of no candidate here")
    baseline = _run_reference(original, source, run)
    answers: Sequence[TaskResult] = ()
    if session is not None and any(isinstance(candidate, Subject) for candidate in opened):
        answers = session.results(original, setup.candidate(original))
    results = tuple(_judge(candidate, baseline, run, is_only=len(opened) == 1) for candidate in opened)
    results = _look_closer(results, original, run, where=asked.where)
    if session is not None:
        results = tuple(_with_tasks(report, session, original, answers, run) for report in results)
    return EvalReport(
        reference=_reference_report(original, baseline),
        data=text,
        device=source.exact.device_name,
        kv_cache_dtype=kv_cache_dtype,
        candidates=results,
        gates=tuple(found for one in results for found in check_gates(asked.gates_of(one.path), one)),
        notes=(*run.notes, *remarks),
        environment=describe_environment(),
    )


def _session(
    asked: Suite,
    samples: str | Path | None,
    apply_chat_template: bool,
    listener: Listener,
    remarks: list[str],
) -> TaskSession | None:
    """The tasks, loaded; None if none is asked for. remarks: takes what is said of them, once each."""
    if not asked.tasks:
        return None

    def say(line: str) -> None:
        if line not in remarks:
            remarks.append(line)
            listener.say(line)

    return TaskSession(
        asked.tasks,
        samples=samples,
        apply_chat_template=apply_chat_template,
        say=say,
        step=listener.step,
    )


class _Run:
    """What every part needs: the windows, how to load and run a model, and whom to tell how far we are.

    examples: so many of a candidate's worst positions are written on.
    """

    def __init__(
        self, windows: list[Tensor], setup: Setup, load: LoadModel, listener: Listener, examples: int
    ) -> None:
        self.windows = windows
        self.setup = setup
        self.load = load
        self.examples = examples
        self.notes: list[str] = []
        self.measured: dict[str, Measured] = {}
        self._listener = listener
        self.done = self._total = 0

    def plan(self, source: Reference, num_candidates: int) -> None:
        """Count the steps: what is kept on disk is none."""
        self._total = source.claim(self.windows) + num_candidates * len(self.windows)

    def begin(self, *opened: Subject | Broken) -> None:
        """Say what is to be known of the models before they run."""
        for one in opened:
            notes = one.notes if isinstance(one, Subject) else (f"{one.name} {one.failure}",)
            for note in notes:
                self.say(note)

    def kept(self, source: Reference, serving: Serving) -> list[bool]:
        """For which windows nothing has to be run."""
        return [source.is_kept(window, serving) for window in self.windows]

    def say(self, line: str) -> None:
        """Tell the user, and note it for the report."""
        self.notes.append(line)
        self._listener.say(line)

    def expect(self, steps: int) -> None:
        """Count on more of them than planned."""
        self._total += steps

    def advance(self, label: str, steps: int = 1) -> None:
        """Count steps as done; an entry of the cache that proved damaged is one more than planned."""
        self.done += steps
        self._total = max(self._total, self.done)
        self._listener.step(label, self.done, self._total)


class _Baseline(NamedTuple):
    """The reference as run: where its predictions come from, and its own figures."""

    source: Reference
    ppl: float
    noise_floor: float


def _names(candidates: Sequence[str | Path] | str | Path) -> list[str]:
    """Each once, as figures and gates are found by name; a single one may stand without a list."""
    several = [candidates] if isinstance(candidates, str | Path) else candidates
    return list(dict.fromkeys(map(str, several)))


def _check_request(candidates: Sequence[str], windows: int, length: int, backend: str) -> None:
    if not candidates:
        raise EvaluationError(
            "no candidate to evaluate", fix="name at least one: quantkit eval REFERENCE CANDIDATE"
        )
    if windows < 1:
        raise EvaluationError(f"--windows {windows}: there has to be one", fix="use --windows 24")
    if length < 2:
        raise EvaluationError(f"--length {length}: too short to predict a next token", fix="use --length 512")
    if backend not in get_args(AskedBackend):
        raise EvaluationError(
            f"--backend {backend}: there is none", fix=f"use one of {', '.join(get_args(AskedBackend))}"
        )


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


def _judge(candidate: Subject | Broken, baseline: _Baseline, run: _Run, *, is_only: bool) -> CandidateReport:
    """Figures of one candidate, or why it has none. Raises, for the only one, what kept it from being loaded."""
    if isinstance(candidate, Broken):
        return candidate.report()
    serving, done = run.setup.candidate(candidate), run.done
    try:
        damage = _run_candidate(candidate, serving, baseline, run)
        return _candidate_report(candidate, serving, damage, None)
    except NotFiniteError as error:
        failure = f"produces {error} of window {run.done - done}"
    except QuantkitError as error:
        if is_only:
            raise
        failure = f"cannot be evaluated: {error.problem}"
    run.say(f"{candidate.name} {failure}: it is broken and gets no figures")
    run.advance(candidate.name, len(run.windows) - (run.done - done))
    return _candidate_report(candidate, serving, None, failure)


def _run_candidate(candidate: Subject, serving: Serving, baseline: _Baseline, run: _Run) -> Damage:
    model = run.load(candidate, serving)
    predictions = model.predictions(run.windows, step_tokens=serving.step_tokens)
    scores = []
    for ids_T, logits in zip(run.windows, predictions, strict=True):
        scores.append(score_window(baseline.source.window(ids_T), logits, ids_T))
        run.advance(candidate.name)
    run.measured[candidate.name] = measure(candidate, scores, run.windows, model, run.examples)
    return summarise(scores, baseline.ppl, baseline.noise_floor)


def _look_closer(
    reports: tuple[CandidateReport, ...], original: Subject, run: _Run, *, where: bool
) -> tuple[CandidateReport, ...]:
    """Reports with what was asked for beside their figures; no model is in memory."""
    reports = tuple(_with_places(report, original, run, where=where) for report in reports)
    worst = worst_examples(original, list(run.measured.values()), run.windows, run.setup, run.load)
    found = dict(zip(run.measured, worst, strict=True))
    return tuple(replace(report, worst=found.get(report.path, ())) for report in reports)


def _with_places(report: CandidateReport, original: Subject, run: _Run, *, where: bool) -> CandidateReport:
    measured = run.measured.get(report.path)
    if measured is None:
        return report
    report = replace(report, kl_histogram=histogram(measured.kl_per_window))
    if not where:
        return report
    is_first = True

    def advance(num_done: int, num_swaps: int) -> None:
        nonlocal is_first
        if is_first:
            run.expect(num_swaps)
        is_first = False
        run.advance(f"{report.path}, linears swapped", num_done)

    try:
        return replace(report, where=draw_map(original, measured, run.windows, run.setup.device, advance))
    except EvaluationError as error:
        run.say(error.problem)
        return report


def _with_tasks(
    report: CandidateReport,
    session: TaskSession,
    original: Subject,
    reference: Sequence[TaskResult],
    run: _Run,
) -> CandidateReport:
    """Compared with the original's answers; a candidate that cannot answer has failed."""
    measured = run.measured.get(report.path)
    if measured is None:
        return report
    note = prompt_note(original, measured.subject)
    if note is not None:
        run.say(note)
    try:
        answers = session.results(measured.subject, run.setup.candidate(measured.subject))
        return replace(report, tasks=compare_all(reference, answers))
    except QuantkitError as error:
        failure = f"cannot be asked: {error.problem}"
        run.say(f"{report.path} {failure}")
        return replace(report, failure=failure)


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
        kind=candidate.kind,
        dtype=serving.dtype_name,
        backend=candidate.backend,
        kernels=serving.kernels,
        bits_per_weight=candidate.size.bits_per_weight,
        bytes=candidate.size.bytes,
        damage=damage,
        failure=failure,
    )
