"""One task asked of one model: lm-eval makes requests and judges answers; between the two is the log of samples."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from quantkit.evaluation.tasks.chat import ChatFormat
from quantkit.evaluation.tasks.library import FEWSHOT_SEED, LoadedTask
from quantkit.evaluation.tasks.quiet import quiet
from quantkit.evaluation.tasks.sample_log import SampleLog

Aggregate = Callable[[Sequence[Any]], float]


class Item(NamedTuple):
    """A document as it was asked. target: what would be right. choices: of a multiple choice.

    answers: the model's, as lm-eval's filter left them: log probabilities and whether they are greedy, or texts.
    """

    prompt: str
    target: str
    choices: tuple[str, ...]
    answers: list[Any]

    def answer(self, metric: str) -> str:
        """The model's answer in words; `metric` says how the likeliest choice is found."""
        if self.choices:
            return self.choices[int(np.argmax(self._scores(metric)))]
        first = self.answers[0]
        if isinstance(first, list) and len(first) == 2 and isinstance(first[1], bool):
            return f"log probability {first[0]:.2f}" + (", the likeliest" if first[1] else "")
        return str(first)

    def _scores(self, metric: str) -> np.ndarray:
        scores = np.array([logprob for logprob, _ in self.answers[: len(self.choices)]])
        if metric.startswith("acc_norm"):
            return scores / [max(1, len(choice)) for choice in self.choices]
        if metric.startswith("acc_bytes"):
            return scores / [max(1, len(choice.encode())) for choice in self.choices]
        return scores


class MetricResult(NamedTuple):
    """One metric of one task: its value for each document that has one, by id, and how they make a score."""

    name: str
    higher_is_better: bool
    values: dict[str, Any]
    items: dict[str, Item]
    aggregate: Aggregate


class TaskResult(NamedTuple):
    """What one model did on one task. chance: the score of guessing, where it is known."""

    task: str
    group: str
    chance: float | None
    metrics: tuple[MetricResult, ...]


def run_task(
    loaded: LoadedTask,
    load_lm: Callable[[], Any],
    log: SampleLog,
    *,
    chat: ChatFormat | None,
    say: Callable[[str], None],
) -> TaskResult:
    """Ask what is not in the log, and judge everything. Raises EvaluationError.

    load_lm: the model as one of lm-eval's, loaded if there is something to ask. chat: None: prompts are plain text.
    """
    task = loaded.task
    with quiet(say):
        requests = build_requests(loaded, chat)
    with quiet(say, hides_stderr=False):
        for kind, of_kind in requests.items():
            _ask(kind, of_kind, load_lm, log)
    with quiet(say):
        task.apply_filters()
        return TaskResult(loaded.name, loaded.group, _chance(task), _judged(loaded))


def build_requests(loaded: LoadedTask, chat: ChatFormat | None) -> dict[str, list[Any]]:
    """lm-eval's requests by kind, as often as each is to be asked: the same for every model with this chat format."""
    task = loaded.task
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    task.build_all_requests(
        limit=loaded.limit,
        apply_chat_template=chat is not None,
        fewshot_as_multiturn=chat is not None,
        chat_template=chat,
    )
    requests: dict[str, list[Any]] = defaultdict(list)
    for request in task.instances:
        requests[request.request_type] += [request] * request.repeats
    return requests


def _ask(kind: str, requests: list[Any], load_lm: Callable[[], Any], log: SampleLog) -> None:
    missing = log.missing(kind, requests)
    if missing:
        lm = load_lm()
        lm.set_cache_hook(log)
        getattr(lm, kind)(missing, disable_tqdm=True)
    for request, answer in zip(requests, log.answers(kind, requests), strict=True):
        request.resps.append(answer)


def _judged(loaded: LoadedTask) -> tuple[MetricResult, ...]:
    """Every metric under every filter, as lm-eval's evaluator does it."""
    task = loaded.task
    by_document = defaultdict(list)
    for request in task.instances:
        by_document[request.doc_id].append(request)
    results: dict[str, MetricResult] = {}
    for filter_name in task.instances[0].filtered_resps:
        suffix = "" if filter_name == "none" else f",{filter_name}"
        for number, document in task.doc_iterator(limit=loaded.limit):
            requests = sorted(by_document[number], key=lambda request: request.idx)
            answers = [request.filtered_resps[filter_name] for request in requests]
            item = _item(task, document, requests, answers)
            for metric, value in task.process_results(document, answers).items():
                result = results.setdefault(metric + suffix, _new_result(task, metric, suffix))
                result.values[str(number)] = value
                result.items[str(number)] = item
    return tuple(results.values())


def _new_result(task: Any, metric: str, suffix: str) -> MetricResult:
    aggregate = task.aggregation().get(metric, np.mean)
    return MetricResult(metric + suffix, bool(task.higher_is_better().get(metric, True)), {}, {}, aggregate)


def _item(task: Any, document: Any, requests: list[Any], answers: list[Any]) -> Item:
    if task.OUTPUT_TYPE != "multiple_choice":
        return Item(str(requests[0].args[0]), str(task.doc_to_target(document)), (), answers)
    choices = tuple(map(str, task.doc_to_choice(document)))
    right = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
    is_number = isinstance(right, int) and 0 <= right < len(choices)
    return Item(str(requests[0].args[0]), choices[right] if is_number else str(right), choices, answers)


def _chance(task: Any) -> float | None:
    """As the task's file says it, else of guessing one of the choices."""
    metadata = task.config.metadata or {}
    if "chance" in metadata:
        return float(metadata["chance"])
    if task.OUTPUT_TYPE != "multiple_choice":
        return None
    counts: dict[int, int] = defaultdict(int)
    for request in task.instances:
        counts[request.doc_id] += 1
    return float(np.mean([1 / count for count in counts.values()]))
