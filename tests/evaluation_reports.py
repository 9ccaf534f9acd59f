"""Reports of evaluations that nobody ran, for what shows them."""

from dataclasses import replace

from quantkit.evaluation.gates import Gates, check_gates
from quantkit.evaluation.report import (
    CandidateReport,
    Damage,
    EvalReport,
    Flip,
    TaskComparison,
)
from tests.reports import DATA, REFERENCE


def comparison(task="probe_copying", recovery=100.0, interval=None, flips=()):
    """A task that both were scored on; what matters to nobody here is made up."""
    return TaskComparison(
        task=task,
        group="probe",
        metric="acc",
        higher_is_better=True,
        num_items=100,
        chance=0.25,
        reference=0.8,
        candidate=0.8 * recovery / 100,
        reference_ci=(0.7, 0.9),
        candidate_ci=(0.6, 0.9),
        recovery=recovery,
        recovery_ci=interval,
        p_value=0.5,
        test="McNemar, exact",
        flips=flips,
    )


def candidate(path, failure=None, tasks=(), **figures):
    """Loses 0.1 nats, unless figures or a failure say otherwise."""
    known = {
        "ppl": 11.0,
        "ppl_increase": 10.0,
        "kl_mean": 0.1,
        "kl_ci": (0.09, 0.11),
        "kl_median": 0.05,
        "kl_p99": 1.0,
        "kl_noise_floor": 0.001,
        "top1": 0.8,
    }
    return CandidateReport(
        kind="16-bit",
        backend="quantkit",
        path=path,
        dtype="float32",
        kernels="torch",
        bits_per_weight=4.25,
        bytes=100,
        damage=None if failure else Damage(**(known | figures)),
        failure=failure,
        tasks=tasks,
    )


def flip(**changes):
    """An item that went from right to wrong."""
    known = {"item": "3", "prompt": "2 + 2 =", "target": " 4", "reference": " 4", "candidate": " 5"}
    return Flip(**(known | {"was_right": True} | changes))


def report(*candidates, gates=None):
    """All gates are for all candidates."""
    gates = gates or Gates()
    return EvalReport(
        reference=replace(REFERENCE, path="original", ppl=10.0, kl_noise_floor=0.001, bytes=400),
        data=replace(DATA, tokens=1000, windows=4, length=16),
        device="cpu",
        kv_cache_dtype="auto",
        candidates=candidates,
        gates=tuple(found for one in candidates for found in check_gates(gates, one)),
        notes=(),
    )
