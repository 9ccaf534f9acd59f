"""The evaluation section of the model card of a checkpoint that quantkit wrote.

The section lies between two markers that `quantize` writes; nothing outside of them is touched, and no file
that lacks them.
"""

import math
import os
import tempfile
from pathlib import Path

from quantkit.card import EVALUATION_END, EVALUATION_START
from quantkit.evaluation.report import LAYER, CandidateReport, EvalReport, TaskComparison

NUM_WORST = 5


def fill_card(report: EvalReport, candidate: CandidateReport) -> bool:
    """Put a candidate's figures in its README.md, atomically; returns whether it has such a section.

    Only local folders with quantkit.json, README.md (a file, not a link into some cache) and both markers.
    Raises OSError if the folder cannot be written.
    """
    folder = Path(candidate.path).expanduser()
    card = folder / "README.md"
    if not (folder / "quantkit.json").is_file() or not card.is_file() or card.is_symlink():
        return False
    before, start, rest = card.read_text(encoding="utf-8").partition(EVALUATION_START)
    _, end, after = rest.partition(EVALUATION_END)
    if not start or not end:
        return False
    _replace(card, f"{before}{start}\n{_section(report, candidate)}\n{end}{after}")
    return True


def _section(report: EvalReport, candidate: CandidateReport) -> str:
    if candidate.damage is None:
        return f"Evaluated against `{_short(report.reference.path)}`.\n\n**Broken**: {candidate.failure}."
    data = report.data
    method = (
        f"Measured against `{_short(report.reference.path)}` on {data.windows} windows of {data.length} tokens of "
        f"`{_short(data.spec)}` (SHA-256 {data.hash[:16]}…), in {candidate.dtype} on {report.device}"
        f"{'' if report.kv_cache_dtype == 'auto' else f', KV cache in {report.kv_cache_dtype}'}."
    )
    damage = candidate.damage
    interval = "" if damage.kl_ci is None else f" (95 %: {damage.kl_ci[0]:.4f} to {damage.kl_ci[1]:.4f})"
    rows = (
        ("perplexity", f"{report.reference.ppl:.3f}", f"{damage.ppl:.3f} ({damage.ppl_increase:+.2f} %)"),
        ("KL divergence, mean", "0", f"{damage.kl_mean:.4f}{interval}"),
        ("KL divergence, median", "0", f"{damage.kl_median:.4f}"),
        ("KL divergence, 99th percentile", "0", f"{damage.kl_p99:.4f}"),
        ("same most likely token", "100 %", f"{100 * damage.top1:.1f} %"),
        (
            "bits per weight (linears)",
            f"{report.reference.bits_per_weight:.2f}",
            f"{candidate.bits_per_weight:.2f}",
        ),
        ("bytes of weights", f"{report.reference.bytes:,}", f"{candidate.bytes:,}"),
        *_task_rows(candidate),
    )
    table = "\n".join(f"| {name} | {original} | {ours} |" for name, original, ours in rows)
    floor = (
        f"Computing the original in {report.reference.dtype} instead of float32 costs a KL divergence of "
        f"{damage.kl_noise_floor:.5f} by itself."
    )
    return f"{method}\n\n| | original | this model |\n|---|---:|---:|\n{table}\n\n{floor}{_worst_linears(candidate)}"


def _task_rows(candidate: CandidateReport) -> list[tuple[str, str, str]]:
    return [
        (
            f"{task.task}, {task.metric}",
            f"{task.reference:.4g}",
            f"{task.candidate:.4g} ({_recovery(task)})",
        )
        for task in candidate.tasks
    ]


def _recovery(task: TaskComparison) -> str:
    if math.isnan(task.recovery):
        return "recovery not known"
    return f"recovery {task.recovery:.1f} %{_interval(task.recovery_ci)}"


def _interval(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f", 95 %: {interval[0]:.1f} to {interval[1]:.1f}"


def _worst_linears(candidate: CandidateReport) -> str:
    """Whose precision would help most, if there is a map; what each costs alone, in the original."""
    linears = () if candidate.where is None else candidate.where.linears
    worst = sorted((one for one in linears if one.kind != LAYER), key=lambda one: -one.kl_in)[:NUM_WORST]
    listed = ", ".join(f"`{one.linear}` ({one.kl_in:.2g})" for one in worst)
    return f"\n\nLinears that cost most, each alone in the original (KL): {listed}." if worst else ""


def _short(name: str) -> str:
    """A local path without the folders above it, which are nobody else's business."""
    return Path(name).resolve().name if Path(name).expanduser().exists() else name


def _replace(card: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=card.parent, prefix=".README.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)
        temporary.chmod(card.stat().st_mode)
        temporary.replace(card)
    finally:
        temporary.unlink(missing_ok=True)
