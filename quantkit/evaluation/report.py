"""What an evaluation found, as frozen data, and as the JSON object of `quantkit eval --json`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

LAYER = "layer"  # the kind of all of a layer's linears together


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
class Flip:
    """An item that one of the two got right, and what both said. was_right: the original did."""

    item: str
    prompt: str
    target: str
    reference: str
    candidate: str
    was_right: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskComparison:
    """One metric of one task, original and candidate on the same items; intervals are of 95 %.

    group: "probe" or "task". chance: what guessing scores, where it is known. recovery: percent of the original's
    score. test: what p_value comes from.
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
class LinearDamage:
    """What one linear (or a layer as a whole: kind "layer") costs, in nats.

    kl_in: KL(original ‖ original with this linear of the candidate). kl_out: what KL(original ‖ candidate) loses when
    this linear is the original's. layer: None for the embedding and the output head.
    """

    linear: str
    layer: int | None
    kind: str
    kl_in: float
    kl_out: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DamageMap:
    """Where a candidate loses. linears: in the order of the computation, measured on `windows` of `length` tokens.

    by_position: (first, last + 1, mean KL) of positions in a window; by_class: (kind of the token that comes next, its
    share of all positions, mean KL). Both over all positions of the evaluation.
    """

    windows: int
    length: int
    linears: tuple[LinearDamage, ...]
    by_position: tuple[tuple[int, int, float], ...]
    by_class: tuple[tuple[str, float, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorstExample:
    """A position where predictions are far apart: the text before it, how each model goes on, greedily; kl in nats."""

    context: str
    reference: str
    candidate: str
    kl: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateReport:
    """One candidate: size and damage, or the reason why it has no figures (`failure`).

    kind: how it is stored, as people call it: "16-bit", "compressed-tensors", "GPTQ", "GGUF", "bnb:nf4". dtype, backend
    and kernels: how it was run; kernels are `quantkit_kernels` that serve on a GPU, `torch`, or the backend. What could
    not be opened has none of these, 0 bytes, and NaN bits per weight. kl_histogram: edges in nats, and how
    many positions are between each two. where, worst: if they were asked for.
    """

    path: str
    kind: str
    dtype: str
    backend: str
    kernels: str
    bits_per_weight: float
    bytes: int
    damage: Damage | None
    failure: str | None = None
    tasks: tuple[TaskComparison, ...] = ()
    kl_histogram: tuple[tuple[float, ...], tuple[int, ...]] | None = None
    where: DamageMap | None = None
    worst: tuple[WorstExample, ...] = ()


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

    device: a GPU's name, or cpu. kv_cache_dtype: as asked; auto: as each candidate says. environment: versions and
    machine. command: the command line, if there was one.
    """

    reference: ReferenceReport
    data: DataInfo
    device: str
    kv_cache_dtype: str
    candidates: tuple[CandidateReport, ...]
    gates: tuple[GateResult, ...]
    notes: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    command: str = ""

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
            "environment": dict(self.environment),
            "command": self.command,
        }


def _candidate_json(candidate: CandidateReport) -> dict[str, Any]:
    figures = (
        dict.fromkeys(Damage.__dataclass_fields__) if candidate.damage is None else asdict(candidate.damage)
    )
    return {
        "path": candidate.path,
        "kind": candidate.kind,
        "dtype": candidate.dtype,
        "backend": candidate.backend,
        "kernels": candidate.kernels,
        **figures,
        "bits_per_weight": candidate.bits_per_weight,
        "bytes": candidate.bytes,
        "failure": candidate.failure,
        "kl_histogram": candidate.kl_histogram,
        "where": None if candidate.where is None else asdict(candidate.where),
        "worst": [asdict(example) for example in candidate.worst],
        "tasks": [asdict(comparison) for comparison in candidate.tasks],
    }
