"""Two models' results on a task, item by item: the comparison that a report shows, and every flip."""

from quantkit.errors import EvaluationError
from quantkit.evaluation.report import Flip, TaskComparison
from quantkit.evaluation.tasks.run import MetricResult, TaskResult
from quantkit.evaluation.tasks.statistics import compare, is_binary


def compare_results(reference: TaskResult, candidate: TaskResult) -> tuple[TaskComparison, ...]:
    """Every metric that both have. Raises EvaluationError if they were not asked the same."""
    theirs = {metric.name: metric for metric in candidate.metrics}
    pairs = [(metric, theirs[metric.name]) for metric in reference.metrics if metric.name in theirs]
    return tuple(_compare_metric(reference, *pair) for pair in pairs)


def _compare_metric(task: TaskResult, reference: MetricResult, candidate: MetricResult) -> TaskComparison:
    _check_same(task.task, reference, candidate)
    ids = list(reference.values)
    before, after = ([result.values[item] for item in ids] for result in (reference, candidate))
    found = compare(before, after, reference.aggregate, higher_is_better=reference.higher_is_better)
    is_right_or_wrong = is_binary(before) and is_binary(after)
    return TaskComparison(
        task=task.task,
        group=task.group,
        metric=reference.name,
        higher_is_better=reference.higher_is_better,
        num_items=len(ids),
        chance=task.chance if is_right_or_wrong else None,
        **found._asdict(),
        flips=_flips(reference, candidate) if is_right_or_wrong else (),
    )


def _check_same(task: str, reference: MetricResult, candidate: MetricResult) -> None:
    ids = reference.values.keys()
    is_same = ids == candidate.values.keys() and all(
        reference.items[item].prompt == candidate.items[item].prompt for item in ids
    )
    if not is_same:
        raise EvaluationError(
            f"task {task}: reference and candidate were not asked the same, since their chat templates differ",
            fix="give both the same chat template, or leave out --apply-chat-template",
        )


def _flips(reference: MetricResult, candidate: MetricResult) -> tuple[Flip, ...]:
    """Items that one of them got right."""
    return tuple(
        Flip(
            item=item,
            prompt=reference.items[item].prompt,
            target=reference.items[item].target,
            reference=reference.items[item].answer(reference.name),
            candidate=candidate.items[item].answer(reference.name),
            was_right=bool(before),
        )
        for item, before in reference.values.items()
        if before != candidate.values[item]
    )
