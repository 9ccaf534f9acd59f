"""lm-eval's tasks and our probes, by name, ready to be asked. lm_eval is imported when the first is wanted."""

import difflib
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from quantkit.errors import EvaluationError, QuantkitError, first_line
from quantkit.evaluation.suites import TaskRequest
from quantkit.evaluation.tasks.quiet import quiet
from quantkit.resources import data_dir

PROBES = "probes"  # the tag of our own
RANDOM_SEED, NUMPY_SEED, FEWSHOT_SEED = 0, 1234, 1234  # lm-eval's own defaults


class LoadedTask(NamedTuple):
    """lm-eval's Task with its data. group: "probe" or "task"."""

    task: Any
    limit: int | None
    group: str

    @property
    def name(self) -> str:
        """As lm-eval calls it."""
        return str(self.task.config.task)


def load_tasks(
    asked: Sequence[TaskRequest], *, say: Callable[[str], None], include: Iterable[Path] = ()
) -> list[LoadedTask]:
    """The tasks of those names, groups and tags taken apart, each once. include: folders with more task files.

    Raises EvaluationError for a name that nobody knows, for a task with two limits or numbers of examples, for data
    that cannot be loaded, and for tasks that run code which the model writes, or need more than text.
    """
    folders = [*include, *(folder for folder in [data_dir("eval") / "probes"] if folder.is_dir())]
    with quiet():  # it warns of metrics whose file leaves out what everybody knows of them
        index = _index({one.name for one in asked}, folders)
        random.seed(RANDOM_SEED)
        np.random.seed(NUMPY_SEED)
        loaded: dict[str, LoadedTask] = {}
        settings: dict[str, tuple[int | None, int | None]] = {}
        for one in asked:
            for name, task in _load(index, one.name).items():
                if settings.setdefault(name, (one.limit, one.num_fewshot)) != (one.limit, one.num_fewshot):
                    raise EvaluationError(f"task {name} is asked for twice, differently", fix="name it once")
                _check(name, task)
                _set_fewshot(name, task, one.num_fewshot, say)
                group = "probe" if PROBES in index.task_index[name].tags else "task"
                loaded.setdefault(name, LoadedTask(task, one.limit, group))
    return list(loaded.values())


def _index(names: set[str], folders: list[Path]) -> Any:
    """lm-eval's index of task files: of our folders alone, if these have all names, since its own take seconds."""
    from lm_eval.tasks import TaskManager

    index = TaskManager(include_path=folders, include_defaults=False)
    if not names <= set(index.all_tasks):
        index = TaskManager(include_path=folders)
    unknown = sorted(names - set(index.all_tasks))
    if unknown:
        near = difflib.get_close_matches(unknown[0], index.all_tasks, n=5)
        raise EvaluationError(
            f"--tasks {unknown[0]}: neither a task of lm-eval nor a probe",
            fix=f"did you mean {', '.join(near)}?"
            if near
            else "`lm-eval ls tasks` lists them; ours are `probes`",
        )
    return index


def _load(index: Any, name: str) -> dict[str, Any]:
    """Tasks by name, with their data."""
    try:
        tasks: dict[str, Any] = index.load([name])["tasks"]
    except QuantkitError:
        raise
    except Exception as error:  # whatever hub, network, disk and the task's own code may raise
        path = (index.task_index[name].cfg or {}).get("dataset_path")
        data = f"its dataset {path}" if path else "its data"
        raise EvaluationError(
            f"task {name}: {data} cannot be loaded ({type(error).__name__}: {first_line(error)})",
            fix="check the network, and HF_TOKEN for gated data; or take tasks that need none: --tasks probes",
        ) from error
    return tasks


def _check(name: str, task: Any) -> None:
    for flag, what in (
        ("UNSAFE_CODE", "runs code that the model writes"),
        ("MULTIMODAL", "needs images or audio"),
    ):
        if getattr(task, flag, False):  # lm-eval sets these where they are true
            raise EvaluationError(f"task {name} {what}: it is not run here", fix="leave it out of --tasks")


def _set_fewshot(name: str, task: Any, asked: int | None, say: Callable[[str], None]) -> None:
    """As lm-eval does: a task whose file says 0 stays at 0."""
    own = task.get_config("num_fewshot")
    if asked is not None and own == 0 != asked:
        say(f"{name}: its file says no examples, so --num-fewshot {asked} does not apply")
    elif asked is not None or own is None:
        task.set_config(key="num_fewshot", value=asked or 0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
