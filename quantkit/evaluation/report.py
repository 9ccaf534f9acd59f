"""What an evaluation found, as frozen data, and as the JSON object of `quantkit eval --json`."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class DataInfo:
    """The text: `tokens` in all of it, SHA-256 of it, and the windows that were read from it."""

    spec: str
    tokens: int
    hash: str
    windows: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """What one candidate's predictions lost; KL in nats over all positions, top1 a fraction.

    ppl_increase: percent over the reference. kl_ci: 95 % bootstrap interval of the mean over whole windows, or
    None with a single window. kl_noise_floor: the same mean for the original in the reference's `dtype`.
    """

    ppl: float
    ppl_increase: float
    kl_mean: float
    kl_ci: tuple[float, float] | None
    kl_median: float
    kl_p99: float
    kl_noise_floor: float
    top1: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Flip:
    """An item that one model got right and the other wrong: `was_right` by the reference.

    item: the document's id. reference, candidate: what each answered.
    """

    item: str
    prompt: str
    target: str
    reference: str
    candidate: str
    was_right: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskComparison:
    """One metric of one task, of one candidate; scores as lm-eval's, intervals 95 % over items.

    group: "probe" or "task". chance: the score of guessing, where it is known. recovery: percent of the reference's
    score, what is better being more. p_value: of no difference, by `test`; None with a single item.
    """

    task: str
    group: str
    metric: str
    higher_is_better: bool
    num_items: int
    chance: float | None
    reference: float
    candidate: float
    reference_ci: tuple[float, float]
    candidate_ci: tuple[float, float]
    recovery: float
    recovery_ci: tuple[float, float] | None
    p_value: float | None
    test: str
    flips: tuple[Flip, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceReport:
    """The original: perplexity in float32, and what computing in `dtype` on the same device costs.

    dtype: the one asked for if it has 16 bits, else the original's own.
    """

    path: str
    content_hash: str
    dtype: str
    ppl: float
    kl_noise_floor: float
    bits_per_weight: float
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateReport:
    """One candidate: size and damage, or the reason why it has no figures (`failure`).

    dtype, kernels: how it was run. kernels: `quantkit_kernels` that serve on a GPU, or `torch`.
    """

    path: str
    dtype: str
    kernels: str
    bits_per_weight: float
    bytes: int
    damage: Damage | None
    failure: str | None = None
    tasks: tuple[TaskComparison, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GateResult:
    """One gate on one candidate; `value` is None where the candidate failed.

    task: the task and metric of a gate on recovery. interval: of 95 %, where the value has one.
    """

    gate: str
    candidate: str
    limit: float
    value: float | None
    passed: bool
    task: str | None = None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalReport:
    """All of it. notes: what happened on the way that the reader should know.

    device: a GPU's name, or cpu. kv_cache_dtype: as asked; auto: as each candidate says.
    """

    reference: ReferenceReport
    data: DataInfo
    device: str
    kv_cache_dtype: str
    candidates: tuple[CandidateReport, ...]
    gates: tuple[GateResult, ...]
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether every candidate has figures and meets every gate."""
        has_figures = all(candidate.failure is None for candidate in self.candidates)
        return has_figures and all(gate.passed for gate in self.gates)

    def to_json(self) -> dict[str, Any]:
        """Plain data for json.dumps; the figures of a failed candidate are null."""
        return {
            "reference": asdict(self.reference),
            "data": asdict(self.data),
            "device": self.device,
            "kv_cache_dtype": self.kv_cache_dtype,
            "candidates": [_candidate_json(candidate) for candidate in self.candidates],
            "gates": [asdict(gate) for gate in self.gates],
            "passed": self.passed,
            "notes": list(self.notes),
        }


def _candidate_json(candidate: CandidateReport) -> dict[str, Any]:
    figures = (
        dict.fromkeys(Damage.__dataclass_fields__) if candidate.damage is None else asdict(candidate.damage)
    )
    return {
        "path": candidate.path,
        "dtype": candidate.dtype,
        "kernels": candidate.kernels,
        **figures,
        "bits_per_weight": candidate.bits_per_weight,
        "bytes": candidate.bytes,
        "failure": candidate.failure,
        "tasks": [asdict(comparison) for comparison in candidate.tasks],
    }
