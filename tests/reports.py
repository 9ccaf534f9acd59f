"""An evaluation report with everything in it, written in code: two candidates with figures, one broken."""

from dataclasses import replace

from quantkit.evaluation.positions import HISTOGRAM_EDGES
from quantkit.evaluation.report import (
    CandidateReport,
    Damage,
    DamageMap,
    DataInfo,
    EvalReport,
    Flip,
    GateResult,
    LinearDamage,
    ReferenceReport,
    TaskComparison,
    WorstExample,
)

NASTY = (
    "</style><script>alert('x')</script> & \"quotes\" \x00\x1b[31m \u202e\ud800 <img src=//evil.example/x>"
)
KINDS = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
NUM_LAYERS = 12
REFERENCE = ReferenceReport(
    path="demo",
    content_hash="ab" * 32,
    dtype="bfloat16",
    ppl=46.47,
    kl_noise_floor=0.00099,
    bits_per_weight=16.0,
    bytes=269_000_000,
)
DATA = DataInfo(spec="docs", tokens=112_965, hash="9b" * 32, windows=24, length=512)


def damage_map(scale: float) -> DamageMap:
    """Linears of twelve layers, the first layer not quantized, and an output head."""
    linears = []
    for layer in range(1, NUM_LAYERS):
        names = [
            (f"model.layers.{layer}.{part}.{kind}", kind) for part, kinds in KINDS.items() for kind in kinds
        ]
        for at, (name, kind) in enumerate([*names, (f"model.layers.{layer}", "layer")]):
            kl = scale * (1 + (7 * layer + 3 * at) % 11) / 500
            linears.append(
                LinearDamage(linear=name, layer=layer, kind=kind, kl_in=kl, kl_out=kl - scale / 200)
            )
    linears.append(
        LinearDamage(linear="lm_head", layer=None, kind="lm_head", kl_in=scale / 9, kl_out=scale / 8)
    )
    return DamageMap(
        windows=2,
        length=64,
        linears=tuple(linears),
        by_position=((0, 1, 3 * scale), (1, 4, 2 * scale), (4, 16, scale)),
        by_class=(("word start", 0.6, scale), ("number", 0.4, 2 * scale)),
    )


def comparison(
    task: str, group: str, lost: float, *, p_value: float, flips: tuple[Flip, ...] = ()
) -> TaskComparison:
    """A task on which the original scores 0.9, and a candidate less."""
    score = 0.9 - lost
    return TaskComparison(
        task=task,
        group=group,
        metric="acc",
        higher_is_better=True,
        num_items=200,
        chance=0.25,
        reference=0.9,
        candidate=score,
        reference_ci=(0.86, 0.94),
        candidate_ci=(score - 0.05, score + 0.05),
        recovery=100 * score / 0.9,
        recovery_ci=(100 * score / 0.9 - 4, 100 * score / 0.9 + 4),
        p_value=p_value,
        test="McNemar, exact",
        flips=flips,
    )


def candidate(path: str, kl: float, num_bytes: int, **fields: object) -> CandidateReport:
    """A candidate with figures; fields: what differs."""
    counts = [0] * (len(HISTOGRAM_EDGES) - 1)
    counts[8], counts[14], counts[20] = 200, 700, 124
    report = CandidateReport(
        path=path,
        kind="compressed-tensors",
        dtype="float32",
        backend="quantkit",
        kernels="torch",
        bits_per_weight=num_bytes / 2e7,
        bytes=num_bytes,
        damage=Damage(
            ppl=46.47 * (1 + kl),
            ppl_increase=100 * kl,
            kl_mean=kl,
            kl_ci=(0.9 * kl, 1.1 * kl),
            kl_median=kl / 3,
            kl_p99=9 * kl,
            kl_noise_floor=0.00099,
            top1=0.913,
        ),
        kl_histogram=(HISTOGRAM_EDGES, tuple(counts)),
        where=damage_map(kl),
        worst=(
            WorstExample(context=f"before {NASTY}", reference="alike, then", candidate="alike, not", kl=5.25),
        )
        * 3,
        tasks=(
            comparison("probe_copying", "probe", kl, p_value=0.0004 if kl > 0.1 else 0.4),
            comparison("arc_easy", "task", kl / 2, p_value=0.3, flips=(FLIP, replace(FLIP, was_right=False))),
        ),
    )
    return replace(report, **fields)


FLIP = Flip(
    item="17",
    prompt=f"Q: {NASTY}\nA:",
    target=" Paris",
    reference=" Paris",
    candidate=" Lyon",
    was_right=True,
)


def rich_report() -> EvalReport:
    """Everything that a page can show."""
    broken = candidate(
        "/out/broken", 1.0, 152_000_000, damage=None, kl_histogram=None, where=None, worst=(), tasks=()
    )
    candidates = (
        candidate("/out/fp8", 0.0249, 190_000_000),
        candidate("/out/int4-rtn", 0.4203, 152_000_000),
        replace(broken, failure="produces NaN logits at position 3 of window 0"),
    )
    values = [one.damage and one.damage.kl_mean for one in candidates]
    return EvalReport(
        reference=REFERENCE,
        data=DATA,
        device="cpu",
        kv_cache_dtype="auto",
        candidates=candidates,
        gates=tuple(
            GateResult(
                gate="max_kl",
                candidate=one.path,
                limit=0.1,
                value=value,
                passed=value is not None and value < 0.1,
            )
            for one, value in zip(candidates, values, strict=True)
        ),
        notes=(f"a note {NASTY}",),
        environment={"quantkit": "0.1.0", "torch": "2.13.0"},
        command="quantkit eval demo /out/fp8 /out/int4-rtn /out/broken --max-kl 0.1",
    )
