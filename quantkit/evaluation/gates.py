"""Limits that a candidate has to meet, and by how much it does not."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

from quantkit.errors import EvaluationError
from quantkit.evaluation.report import CandidateReport, Damage, GateResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Gates:
    """max_kl: of the mean, nats. max_ppl_increase: percent. min_top1: fraction. None: no such gate.

    Raises EvaluationError for a limit that is out of its range.
    """

    max_kl: float | None = None
    max_ppl_increase: float | None = None
    min_top1: float | None = None

    def __post_init__(self) -> None:
        _check("--max-kl", self.max_kl, 0, math.inf, "a KL divergence in nats, such as 0.05")
        _check("--max-ppl-increase", self.max_ppl_increase, -100, math.inf, "percent, such as 5%")
        _check("--min-top1", self.min_top1, 0, 1, "a fraction of all positions, such as 0.9")


def parse_percent(text: str) -> float:
    """ "5%" or "5" as 5.0. Raises EvaluationError."""
    try:
        return float(text.strip().removesuffix("%"))
    except ValueError:
        problem = f"--max-ppl-increase {text}: not a percentage"
        raise EvaluationError(problem, fix="write it as 5% or 5") from None


def check_gates(gates: Gates, candidates: tuple[CandidateReport, ...]) -> tuple[GateResult, ...]:
    """Every gate on every candidate, in that order; a candidate without figures meets none."""
    chosen = [(name, limit) for name, limit in asdict(gates).items() if limit is not None]
    return tuple(_check_gate(name, limit, candidate) for candidate in candidates for name, limit in chosen)


def _check_gate(name: str, limit: float, candidate: CandidateReport) -> GateResult:
    value = None if candidate.damage is None else _VALUES[name](candidate.damage)
    passed = value is not None and (value >= limit if name.startswith("min_") else value <= limit)
    return GateResult(gate=name, candidate=candidate.path, limit=limit, value=value, passed=passed)


_VALUES: Mapping[str, Callable[[Damage], float]] = {
    "max_kl": lambda damage: damage.kl_mean,
    "max_ppl_increase": lambda damage: damage.ppl_increase,
    "min_top1": lambda damage: damage.top1,
}


def describe_failure(result: GateResult) -> str:
    """One line: which candidate misses which gate, and by how much."""
    name = "--" + result.gate.replace("_", "-")
    unit = "%" if result.gate == "max_ppl_increase" else ""
    if result.value is None:
        return f"{result.candidate}: {name} {result.limit:g}{unit} not met: no figures"
    excess = abs(result.value - result.limit)
    side = "below" if result.gate == "min_top1" else "above"
    what = {"max_kl": "KL", "max_ppl_increase": "perplexity increase", "min_top1": "top-1 agreement"}[
        result.gate
    ]
    found = f"{what} {result.value:.4g}{unit} is {excess:.3g}{unit} {side} the limit"
    return f"{result.candidate}: {name} {result.limit:g}{unit} not met: {found}"


def _check(option: str, value: float | None, low: float, high: float, fix: str) -> None:
    if value is not None and not (math.isfinite(value) and low <= value <= high):
        raise EvaluationError(f"{option} {value:g}: out of range", fix=f"give {fix}")


NO_GATES = Gates()
