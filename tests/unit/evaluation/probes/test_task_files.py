"""The task files as lm-eval reads them: what guessing scores is what they say, and a model that knows scores all."""

import logging
import math
import random

import pytest
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from quantkit.evaluation.probes import task_folder

NAMES = sorted(f"probe_{file.stem}" for file in task_folder().glob("*.yaml"))


@pytest.fixture(scope="module")
def tasks():
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=str(task_folder()), include_defaults=False)
    return manager.load(NAMES)["tasks"]


def score(task, answer):
    """Aggregated first metric of a task, `answer(doc, request)` giving the response to each request."""
    values = []
    for doc in task.eval_docs:
        context = task.fewshot_context(doc, task.config.num_fewshot or 0)
        requests = task.construct_requests(doc, context, metadata=(task.config.task, 0, 1))
        requests = [requests] if isinstance(requests, Instance) else requests
        results = task.process_results(doc, [answer(doc, request) for request in requests])
        values.append(next(iter(results.values())))
    return next(iter(task.aggregation().values()))(values)


def guess(rng):
    """Answers of a model that knows nothing: any choice, no greedy hit, every byte as likely as another."""

    def answer(doc, request):
        if request.request_type == "generate_until":
            return ""
        size = len(request.args[-1].encode())
        if request.request_type == "loglikelihood_rolling":
            return -size * math.log(256)
        return rng.random(), False

    return answer


def know(doc, request):
    """Answers of a model that knows the answer."""
    if request.request_type == "generate_until":
        return " ".join(map(str, range(100)))
    if request.request_type == "loglikelihood_rolling":
        return 0.0
    right = doc["choices"][doc["answer"]] if "choices" in doc else doc["target"]
    return (0.0, True) if request.args[1] == right else (-9.0, False)


@pytest.mark.parametrize("name", NAMES)
def test_guessing_scores_what_the_file_says(tasks, name):
    task = tasks[name]
    chance = task.config.metadata.get("chance")
    if chance is not None:
        spread = math.sqrt(chance * (1 - chance) / len(task.eval_docs)) if chance < 1 else 0
        assert score(task, guess(random.Random(name))) == pytest.approx(chance, abs=4 * spread + 1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_knowing_scores_all(tasks, name):
    task = tasks[name]
    (better,) = task.higher_is_better().values()
    assert score(task, know) == (1.0 if better else 0.0)


def test_all_are_found_by_their_tag():
    manager = TaskManager(include_path=str(task_folder()), include_defaults=False)
    assert sorted(manager.load(["probes"])["tasks"]) == NAMES
