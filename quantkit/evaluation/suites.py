"""Suites: what an evaluation runs and which limits hold, read from YAML; options given beside a suite win."""

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from quantkit.errors import EvaluationError, RecipeError
from quantkit.evaluation.gates import NO_GATES, Gates
from quantkit.recipe.load import parse_yaml
from quantkit.resources import data_dir

_TASKS_FIX = "add --tasks A,B, or a --suite that has some"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TaskRequest(_Strict):
    """A task, group or tag of lm-eval. limit: items, from the first; None: all. num_fewshot: None: the task's own."""

    name: str
    limit: int | None = Field(default=None, ge=1)
    num_fewshot: int | None = Field(default=None, ge=0)


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class Suite(_Strict):
    """data, windows, length: the text. where: map the damage. thresholds: the gates of every candidate.

    candidates: gates of candidates by the last part of their names, with * and ?, which win over `thresholds`.
    """

    data: str = "docs"
    windows: int = 24
    length: int = 512
    tasks: tuple[Annotated[TaskRequest, BeforeValidator(_named)], ...] = ()
    where: bool = False
    thresholds: Gates = NO_GATES
    candidates: Mapping[str, Gates] = {}

    @property
    def needs_tasks(self) -> bool:
        """Whether a gate is of a task."""
        return any(gates.needs_tasks for gates in (self.thresholds, *self.candidates.values()))

    def gates_of(self, candidate: str) -> Gates:
        """The limits that a candidate has to meet."""
        gates, name = self.thresholds, Path(candidate).name
        for pattern, own in self.candidates.items():
            if fnmatchcase(name, pattern):
                gates = gates.overridden_by(own)
        return gates

    def unmatched(self, candidates: Iterable[str]) -> list[str]:
        """Patterns of candidates that none of these has."""
        found = [Path(candidate).name for candidate in candidates]
        return [
            pattern for pattern in self.candidates if not any(fnmatchcase(name, pattern) for name in found)
        ]

    def limited_to(self, tasks: Collection[str]) -> "Suite":
        """Without limits of other tasks than these, which are asked instead of the suite's own."""
        candidates = {pattern: own.limited_to(tasks) for pattern, own in self.candidates.items()}
        return self.model_copy(
            update={"thresholds": self.thresholds.limited_to(tasks), "candidates": candidates}
        )


def plan_suite(
    name_or_path: str | Path | None,
    *,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    num_fewshot: int | None = None,
    gates: Gates = NO_GATES,
    **given: Any,
) -> Suite:
    """A suite, or one of defaults, with what was given beside it; None is not given.

    tasks: instead of the suite's; limit, num_fewshot: of each task. gates: win over those of the suite.
    Raises EvaluationError for a suite that is none, and for limits of tasks where there is none.
    """
    suite = Suite() if name_or_path is None else load_suite(str(name_or_path))
    requests = tuple(TaskRequest(name=name) for name in tasks) or suite.tasks
    each = _set({"limit": limit, "num_fewshot": num_fewshot})
    changes = {
        "tasks": tuple(request.model_copy(update=each) for request in requests),
        "thresholds": suite.thresholds.overridden_by(gates),
        "candidates": {pattern: own.overridden_by(gates) for pattern, own in suite.candidates.items()},
    }
    least = {"limit": 1, "num_fewshot": 0}
    for name, value in each.items():
        if value < least[name]:
            option = f"--{name.replace('_', '-')}"
            raise EvaluationError(f"{option} {value}: out of range", fix=f"give {least[name]} or more")
    planned = suite.model_copy(update=changes | _set(given))
    if each and not requests:
        raise EvaluationError("--limit and --num-fewshot are of tasks: there are none", fix=_TASKS_FIX)
    if planned.needs_tasks and not requests:
        raise EvaluationError("--min-recovery is of tasks: there are none", fix=_TASKS_FIX)
    return planned


def _set(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def shipped_suites() -> dict[str, Path]:
    """The suites that come with quantkit, by name."""
    return {file.stem: file for file in sorted(data_dir("eval").glob("*.yaml"))}


def load_suite(name_or_path: str) -> Suite:
    """A shipped suite by name, or a YAML file. Raises EvaluationError naming file and line."""
    shipped = shipped_suites()
    file = shipped.get(name_or_path, Path(name_or_path))
    if not file.is_file():
        near = difflib.get_close_matches(name_or_path, shipped, n=1)
        hint = f"did you mean `{near[0]}`? " if near else ""
        problem = f"--suite {name_or_path}: neither a shipped suite nor a file"
        raise EvaluationError(problem, fix=f"{hint}there are {', '.join(shipped)}")
    try:
        content, lines = parse_yaml(file, "docs/evaluation.md")
        return Suite.model_validate(content)
    except (RecipeError, EvaluationError) as error:
        place = "" if str(file) in error.problem else f"{file}: "
        raise EvaluationError(f"{place}{error.problem}", fix=error.fix) from None
    except ValidationError as error:
        raise _invalid(error, file, lines) from None


def _invalid(error: ValidationError, file: Path, lines: Mapping[str, int]) -> EvaluationError:
    first = error.errors()[0]
    parts = [str(part) for part in first["loc"]]
    known = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    line = next((f":{lines[path]}" for path in known if path in lines), "")
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        keys = Suite.model_fields if len(parts) == 1 else Gates.__dataclass_fields__
        keys = TaskRequest.model_fields if parts[0] == "tasks" else keys
        return EvaluationError(f"{file}{line}: unknown key {parts[-1]}", fix=f"keys are {', '.join(keys)}")
    problem = f"{file}{line}: {'.'.join(parts)} is {first['input']!r}: {first['msg']}"
    return EvaluationError(problem, fix="correct it; docs/evaluation.md explains suites")
