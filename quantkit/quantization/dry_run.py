"""What a quantization run would do and cost, from headers and a timed sample; nothing is written."""

import dataclasses
import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from quantkit.algorithms.rtn import rtn
from quantkit.arch import Role
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.loaders import LinearFacts, LoaderVerdict, loader_verdicts
from quantkit.numerics.sqnr import signal_and_noise
from quantkit.quantization.calibrated import expected_tokens
from quantkit.quantization.calibration_cost import CalibrationCost, calibration_cost
from quantkit.quantization.linear import CHUNK_ELEMENTS
from quantkit.quantization.prepare import Entry, prepare
from quantkit.recipe import LinearPlan, QuantPlan, Recipe
from quantkit.recipe.model import Scales
from quantkit.schemes import PerTensor, Scheme
from quantkit.schemes.labels import scheme_label
from quantkit.schemes.tiles import dequantize_weight

SAMPLE_ELEMENTS = 1 << 20
DISK_BYTES_PER_SECOND = 1e9  # of reading and of writing; an ordinary NVMe drive


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One tensor of the source: its scheme or the reason why it stays, and its bytes before and after."""

    name: str
    treatment: str
    before_bytes: int
    after_bytes: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DryRun:
    """The plan in numbers. seconds and peak_bytes are estimates, calibration included (None: no data is used)."""

    rows: tuple[Row, ...]
    before_bytes: int
    after_bytes: int
    peak_bytes: int
    seconds: float
    loaders: tuple[LoaderVerdict, ...]
    calibration: CalibrationCost | None

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return dataclasses.asdict(self)


def dry_run(
    source: Path,
    recipe: Recipe,
    *,
    folder: Path | None = None,
    where: str = "recipe",
    calib: str | None = None,
    device: str | None = None,
    announce: Callable[[str], None] = lambda line: None,
) -> DryRun:
    """Plan a run; raises what `quantize_checkpoint` would raise before writing. The calibration text is read.

    folder: where the run would write (None: not said yet). An earlier run in it is not compared with this one.
    """
    checkpoint, plan, spec, entries, chosen = prepare(
        source, recipe, folder, where=where, calib=calib, device=device, announce=announce
    )
    rows = tuple(_rows(checkpoint, plan, entries))
    after_bytes = sum(row.after_bytes for row in rows)
    cost = None
    if spec is not None:
        tokens = expected_tokens(checkpoint, recipe, spec, chosen, announce)
        cost = calibration_cost(checkpoint, plan, tokens, chosen)
    return DryRun(
        rows=rows,
        before_bytes=sum(row.before_bytes for row in rows),
        after_bytes=after_bytes,
        peak_bytes=_peak_bytes(plan) + (cost.peak_bytes if cost else 0),
        seconds=_seconds(checkpoint, plan, after_bytes) + (cost.seconds if cost else 0),
        loaders=tuple(loader_verdicts([_facts(linear) for linear in plan.linears], plan.kv)),
        calibration=cost,
    )


def _facts(linear: LinearPlan) -> LinearFacts:
    return LinearFacts(linear.name, linear.group, linear.scheme, linear.shape, linear.role is Role.EXPERT)


def _rows(checkpoint: Checkpoint, plan: QuantPlan, entries: list[Entry]) -> Iterator[Row]:
    reasons = {stays.name: f"16 bits: {stays.reason}" for stays in plan.stays}
    reasons |= {
        f"{linear.name}.weight": f"16 bits: {linear.reason}" for linear in plan.linears if not linear.scheme
    }
    for entry in entries:
        name, treatment, before = entry.tensors[0].name, "scale of the KV cache", 0
        if entry.source is not None:
            name, before = entry.source, checkpoint.info(entry.source).num_bytes
            treatment = reasons.get(name, "copied")
        if entry.linear is not None:
            treatment = scheme_label(entry.linear.quantized_to)
        after = sum(tensor.num_bytes for tensor in entry.tensors)
        yield Row(name=name, treatment=treatment, before_bytes=before, after_bytes=after)


def _peak_bytes(plan: QuantPlan) -> int:
    """This process as it is, plus the largest linear: its codes, their packed form, and one float32 chunk."""
    now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return now + max(map(_working_bytes, plan.quantized), default=0)


def _working_bytes(linear: LinearPlan) -> int:
    spec, weights = linear.quantized_to.weight, linear.num_weights
    chunk = weights if isinstance(spec.granularity, PerTensor) else min(weights, CHUNK_ELEMENTS)
    return 2 * weights + weights * spec.bits // 8 + 24 * chunk


def _seconds(checkpoint: Checkpoint, plan: QuantPlan, after_bytes: int) -> float:
    """The time of a timed sample of each scheme, scaled up, plus reading and writing at an ordinary disk's speed."""
    weights: dict[tuple[Scheme, Scales], int] = defaultdict(int)
    examples: dict[tuple[Scheme, Scales], LinearPlan] = {}
    for linear in plan.quantized:
        kind = linear.quantized_to, linear.scales
        weights[kind] += linear.num_weights
        examples.setdefault(kind, linear)
    computing = sum(
        count * _seconds_per_weight(checkpoint, examples[kind], plan.scale_dtype)
        for kind, count in weights.items()
    )
    return computing + (checkpoint.num_bytes + after_bytes) / DISK_BYTES_PER_SECOND


def _seconds_per_weight(checkpoint: Checkpoint, linear: LinearPlan, scale_dtype: torch.dtype) -> float:
    spec = linear.quantized_to.weight
    num_rows, num_cols = linear.shape
    rows = min(num_rows, max(1, SAMPLE_ELEMENTS // num_cols))
    w_NK = checkpoint.read_rows(f"{linear.name}.weight", 0, rows)
    started = time.perf_counter()
    result = rtn(w_NK, spec, scale_dtype, scales="minmax" if linear.scales == "minmax" else "mse")
    signal_and_noise(w_NK, dequantize_weight(result.codes_NK, spec.granularity, result.qparams))
    return (time.perf_counter() - started) / w_NK.numel()
