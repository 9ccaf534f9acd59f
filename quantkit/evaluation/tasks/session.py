"""All tasks of an evaluation, asked of one model after another: each is loaded once, if its log misses an answer.

samples folder / model, hash of how it runs / task-version.jsonl
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

from quantkit.env import cache_dir
from quantkit.evaluation.backends import load_subject
from quantkit.evaluation.report import TaskComparison
from quantkit.evaluation.serving import Serving
from quantkit.evaluation.subjects import Subject
from quantkit.evaluation.suites import TaskRequest
from quantkit.evaluation.tasks.chat import ChatFormat
from quantkit.evaluation.tasks.compare import compare_results
from quantkit.evaluation.tasks.library import load_tasks
from quantkit.evaluation.tasks.run import TaskResult, run_task
from quantkit.evaluation.tasks.sample_log import SampleLog
from quantkit.runtime.llm import LLM
from quantkit.tokens import load_tokenizer
from quantkit.version import __version__

BATCH_SIZE = 8  # requests that transformers computes at once
_TEXT_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "generation_config.json",
)


class Progress(Protocol):
    """Hears how many of a task's requests are answered."""

    def __call__(self, label: str, done: int, total: int, unit: str, /) -> None:
        """`done` of `total`, in units of that name."""
        ...


class TaskSession:
    """samples: folder of the logs; None: under QUANTKIT_CACHE. say: told what users should know, step: how far it is.

    Raises what `load_tasks` does, before any model is loaded.
    """

    def __init__(
        self,
        asked: Sequence[TaskRequest],
        *,
        samples: str | Path | None,
        apply_chat_template: bool,
        say: Callable[[str], None],
        step: Progress,
    ) -> None:
        self._tasks = load_tasks(asked, say=say)
        self._samples = Path(samples) if samples else cache_dir() / "samples"
        self._apply_chat_template = apply_chat_template
        self._say = say
        self._step = step

    @property
    def names(self) -> frozenset[str]:
        """Of the tasks; those of groups and tags each by itself."""
        return frozenset(loaded.name for loaded in self._tasks)

    def results(self, subject: Subject, serving: Serving) -> tuple[TaskResult, ...]:
        """One for each task. Raises EvaluationError if the model cannot answer, OutputError of the log, as LLM does."""
        folder = self._samples / f"{Path(subject.name).name}-{_identity(subject, serving)}"
        load_lm = cache(lambda: _load(subject, serving))
        chat = ChatFormat(subject.tokenizer.backend) if self._apply_chat_template else None
        results = []
        for loaded in self._tasks:
            step = partial(self._answered, f"{subject.name}, {loaded.name}")
            file = f"{loaded.name}-{loaded.task.VERSION}.jsonl".replace("/", "__")
            with SampleLog(folder / file, step) as log:
                results.append(run_task(loaded, load_lm, log, chat=chat, say=self._say))
        return tuple(results)

    def _answered(self, label: str, done: int, total: int) -> None:
        self._step(label, done, total, "requests")


def compare_all(
    reference: Sequence[TaskResult], candidate: Sequence[TaskResult]
) -> tuple[TaskComparison, ...]:
    """Every metric of every task."""
    pairs = zip(reference, candidate, strict=True)
    return tuple(comparison for pair in pairs for comparison in compare_results(*pair))


def _load(subject: Subject, serving: Serving) -> Any:
    """A model of lm-eval: our engine, or lm-eval's own around a model of transformers."""
    if subject.backend != "quantkit":
        return _load_transformers(subject, serving)
    from quantkit.evaluation.tasks.engine_lm import EngineLM

    return EngineLM(
        LLM(
            subject.checkpoint,
            dtype=serving.dtype_name,
            device=str(serving.target.device),
            kv_cache_dtype=serving.kv_cache_dtype,
        )
    )


def _load_transformers(subject: Subject, serving: Serving) -> Any:
    from quantkit.evaluation.backends.transformers import TransformersModel
    from quantkit.evaluation.tasks.hf_lm import transformers_lm

    loaded = load_subject(subject, serving)
    assert isinstance(loaded, TransformersModel), "every other backend is transformers'"
    tokenizer = load_tokenizer(subject.checkpoint.path).backend  # of its own: it is given a padding token
    return transformers_lm(loaded.model, tokenizer, batch_size=BATCH_SIZE)


def _identity(subject: Subject, serving: Serving) -> str:
    """A hash of what answers depend on besides the request."""
    how = (subject.backend, serving.dtype_name, serving.kv_cache_dtype, serving.kernels, serving.device_name)
    parts = (__version__, subject.kind, subject.checkpoint.content_hash(), *how, *_text_files(subject))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _text_files(subject: Subject) -> list[tuple[str, str]]:
    """Hashes of what makes tokens of a prompt, and of what ends an answer: requests are logged by their text alone."""
    folder = subject.checkpoint.path
    files = sorted({file for pattern in _TEXT_FILES for file in folder.glob(pattern) if file.is_file()})
    return [(file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files]
