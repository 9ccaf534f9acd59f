"""Limits that a candidate has to meet, and by how much it does not."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, ConfigDict

from quantkit.errors import EvaluationError
from quantkit.evaluation.report import CandidateReport, Damage, GateResult


def parse_percent(text: str | None, option: str) -> float | None:
    """What the option says: "5%" or "5" as 5.0, None as None. Raises EvaluationError."""
    try:
        return None if text is None else float(text.strip().removesuffix("%"))
    except ValueError:
        raise EvaluationError(f"{option} {text}: not a percentage", fix="write it as 5% or 5") from None


def _percent(value: Any) -> Any:
    """A suite's "5%" as a number; what is no percentage is left to be refused with its place."""
    return value.strip().removesuffix("%") if isinstance(value, str) else value


Percent = Annotated[float, BeforeValidator(_percent)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gates:
    """max_kl: of the mean, nats. max_ppl_increase: percent. min_top1: fraction. None: no such gate.

    min_recovery: of every task, percent of the original's score; tasks: of the tasks named, instead.
    Raises EvaluationError for a limit that is out of its range.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    max_kl: float | None = None
    max_ppl_increase: Percent | None = None
    min_top1: float | None = None
    min_recovery: Percent | None = None
    tasks: Mapping[str, Percent] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check("--max-kl", self.max_kl, 0, math.inf, "a KL divergence in nats, such as 0.05")
        _check("--max-ppl-increase", self.max_ppl_increase, -100, math.inf, "percent, such as 5%")
        _check("--min-top1", self.min_top1, 0, 1, "a fraction of all positions, such as 0.9")
        for option, limit in {"--min-recovery": self.min_recovery, **self.tasks}.items():
            _check(option, limit, 0, math.inf, "percent of the original's score, such as 95%")

    @property
    def needs_tasks(self) -> bool:
        """Whether something has to be scored besides text."""
        return self.min_recovery is not None or bool(self.tasks)

    def overridden_by(self, stronger: "Gates") -> "Gates":
        """These limits, but for those that `stronger` has; its limit of every task leaves none of single ones."""
        changes = {name: limit for name in _FIELDS if (limit := getattr(stronger, name)) is not None}
        kept = self.tasks if stronger.min_recovery is None else {}
        return replace(self, **changes, tasks={**kept, **stronger.tasks})

    def limited_to(self, tasks: Collection[str]) -> "Gates":
        """Without limits of other tasks than these."""
        return replace(self, tasks={name: limit for name, limit in self.tasks.items() if name in tasks})


_FIELDS = ("max_kl", "max_ppl_increase", "min_top1", "min_recovery")


@dataclass(frozen=True, slots=True)
class _Figure:
    """What a gate of the text looks at: the figure, its interval if it has one, and what to call it."""

    what: str
    unit: str
    value: Callable[[Damage], float]
    interval: Callable[[Damage], tuple[float, float] | None] = lambda damage: None


_FIGURES: Mapping[str, _Figure] = {
    "max_kl": _Figure("KL", "", lambda damage: damage.kl_mean, lambda damage: damage.kl_ci),
    "max_ppl_increase": _Figure("perplexity increase", "%", lambda damage: damage.ppl_increase),
    "min_top1": _Figure("top-1 agreement", "", lambda damage: damage.top1),
}


def check_gates(gates: Gates, candidate: CandidateReport) -> tuple[GateResult, ...]:
    """Every gate that was set, on one candidate; a candidate without figures meets none.

    A gate fails by its figure alone, wherever the figure's interval lies.
    """
    return (*_check_text(gates, candidate), *_check_tasks(gates, candidate))


def _check_text(gates: Gates, candidate: CandidateReport) -> Iterator[GateResult]:
    for gate, figure in _FIGURES.items():
        limit = getattr(gates, gate)
        if limit is not None:
            found = candidate.damage
            value = None if found is None else figure.value(found)
            yield _result(gate, candidate, limit, value, None if found is None else figure.interval(found))


def _check_tasks(gates: Gates, candidate: CandidateReport) -> Iterator[GateResult]:
    """One result for each metric of each task that was scored, and for each task with a limit that was not."""
    for found in candidate.tasks:
        limit = gates.tasks.get(found.task, gates.min_recovery)
        if limit is not None:
            value = found.recovery if math.isfinite(found.recovery) else None
            name = f"{found.task} ({found.metric})"
            yield _result("min_recovery", candidate, limit, value, found.recovery_ci, name)
    scored = {found.task for found in candidate.tasks}
    for task, limit in gates.tasks.items():
        if task not in scored:
            yield _result("min_recovery", candidate, limit, None, None, task)
    if gates.min_recovery is not None and not scored:
        yield _result("min_recovery", candidate, gates.min_recovery, None, None)


def _result(
    gate: str,
    candidate: CandidateReport,
    limit: float,
    value: float | None,
    interval: tuple[float, float] | None,
    task: str | None = None,
) -> GateResult:
    passed = value is not None and (value >= limit if gate.startswith("min_") else value <= limit)
    return GateResult(
        gate=gate,
        candidate=candidate.path,
        task=task,
        limit=limit,
        value=value,
        interval=interval,
        passed=passed,
    )


def describe_gate(result: GateResult) -> str:
    """The gate as an option of the command line, and its task if it has one."""
    unit = "" if result.gate in ("max_kl", "min_top1") else "%"
    option = f"--{result.gate.replace('_', '-')} {result.limit:g}{unit}"
    return option if result.task is None else f"{option} of {result.task}"


def describe_failure(result: GateResult) -> str:
    """One line: which candidate misses which gate, by how much, and whether that may be chance."""
    failure = f"{result.candidate}: {describe_gate(result)} not met"
    if result.value is None:
        unknown = "no recovery is known: the original scores 0, or it was not asked"
        return f"{failure}: {'no figures' if result.task is None else unknown}"
    figure = _FIGURES.get(result.gate)
    what, unit = ("recovery", "%") if figure is None else (figure.what, figure.unit)
    excess = abs(result.value - result.limit)
    side = "below" if result.gate.startswith("min_") else "above"
    line = f"{failure}: {what} {result.value:.4g}{unit} is {excess:.3g}{unit} {side} the limit"
    if result.interval is None:
        return line
    low, high = result.interval
    verb = "includes" if low <= result.limit <= high else "excludes"
    return f"{line}, which the 95 % interval ({low:.4g} to {high:.4g}) {verb}"


def _check(option: str, value: float | None, low: float, high: float, fix: str) -> None:
    if value is not None and not (math.isfinite(value) and low <= value <= high):
        raise EvaluationError(f"{option} {value:g}: out of range", fix=f"give {fix}")


NO_GATES = Gates()
