"""Reference and candidates opened and checked before anything runs; a candidate that is broken has a verdict."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from quantkit.errors import QuantkitError
from quantkit.evaluation.backends import check_runnable
from quantkit.evaluation.report import CandidateReport
from quantkit.evaluation.serving import Serving, Setup
from quantkit.evaluation.subjects import (
    AskedBackend,
    Subject,
    check_comparable,
    check_length,
    counted_like,
    open_subject,
)

SAMPLE_CHARS = 1 << 16  # of text that all tokenizers have to split alike

Announce = Callable[[str], None]


class Broken(NamedTuple):
    """A candidate that cannot be evaluated, and why."""

    name: str
    failure: str

    def report(self) -> CandidateReport:
        """Its row, in which the verdict is all there is."""
        return CandidateReport(
            path=self.name,
            kind="",
            dtype="",
            backend="",
            kernels="",
            bits_per_weight=math.nan,
            bytes=0,
            damage=None,
            failure=self.failure,
        )


def open_reference(source: str, backend: AskedBackend, setup: Setup, announce: Announce) -> Subject:
    """The original, which can be run. Raises QuantkitError, also for options that would suit no candidate."""
    original = open_subject(source, backend, announce)
    is_ours = original.backend == "quantkit"
    return _checked(original, setup.candidate(original) if is_ours else setup.exact(original))


def open_candidates(
    sources: Sequence[str],
    original: Subject,
    documents: Iterable[str],
    *,
    backend: AskedBackend,
    setup: Setup,
    announce: Announce,
) -> list[Subject | Broken]:
    """Everything that can be refused before hours of work: one of several is a verdict, the only one an error.

    documents: what will be evaluated; all tokenizers have to split its beginning alike. Raises QuantkitError.
    """
    sample = _beginning(documents)
    opened: list[Subject | Broken] = []
    for source in sources:
        try:
            candidate = _open(source, original, backend, announce)
            check_comparable(original, candidate, sample)
            opened.append(_checked(candidate, setup.candidate(candidate)))
        except QuantkitError as error:
            if len(sources) == 1:
                raise
            opened.append(Broken(source, f"cannot be evaluated: {error.problem}"))
    return opened


def _open(source: str, original: Subject, backend: AskedBackend, announce: Announce) -> Subject:
    if source.startswith("bnb:"):
        from quantkit.evaluation.backends.bitsandbytes import bitsandbytes_subject

        return bitsandbytes_subject(source, original)
    return counted_like(open_subject(source, backend, announce), original)


def _checked(subject: Subject, serving: Serving) -> Subject:
    """The same with notes on how it will be run."""
    check_length(subject, serving.length)
    return subject._replace(notes=(*subject.notes, *check_runnable(subject, serving)))


def _beginning(documents: Iterable[str]) -> str:
    sample = ""
    for document in documents:
        sample += document[:SAMPLE_CHARS] + "\n\n"
        if len(sample) >= SAMPLE_CHARS:
            break
    return sample
