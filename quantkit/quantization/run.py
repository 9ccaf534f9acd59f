"""The story of a quantization run: read, plan, calibrate, quantize, write; resumable.

Without data, peak memory is a few tensors: weights are read in row chunks, the codes of one linear are held until
they are packed. With data, layers are calibrated and staged first, then written like everything else. Killed at any
instant and started again, a run continues, and ends with the same bytes.
"""

import json
import math
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from quantkit.errors import CalibrationError, OutputError, SourceError, UnsupportedModelError
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.compressed_tensors import encode_linear
from quantkit.formats.folder import FolderState, remove_run
from quantkit.formats.safetensors_file import iter_bytes
from quantkit.formats.shards import DEFAULT_LIMITS, Limits, ShardWriter
from quantkit.formats.stage import Stage
from quantkit.quantization.calibrated import NOTHING, Staged, calibrate_into, read_tokens
from quantkit.quantization.linear import quantize_linear
from quantkit.quantization.prepare import Entry, prepare, refuse_foreign
from quantkit.quantization.progress import Step
from quantkit.quantization.record import (
    OBSERVED,
    SECONDS,
    QuantReport,
    has_sidecar_tensors,
    is_same_run,
    linear_notes,
    plan_summary,
    source_stamps,
    write_companions,
)
from quantkit.recipe import QuantPlan, Recipe


def quantize_checkpoint(
    source: Path,
    recipe: Recipe,
    folder: Path,
    *,
    base: str | None = None,
    where: str = "recipe",
    overwrite: bool = False,
    calib: str | None = None,
    device: str | None = None,
    on_step: Callable[[Step], None] = lambda step: None,
    announce: Callable[[str], None] = lambda line: None,
    limits: Limits = DEFAULT_LIMITS,
) -> QuantReport:
    """Quantize a checkpoint folder into another, or continue an interrupted run of the same plan.

    base: the source's name on the card. where: the recipe's name in errors. calib: SPEC of the calibration text; a
    recipe that needs some and gets none takes the documentation of Python. device: "cpu" or "cuda", for calibration;
    None: a GPU if there is one. announce: told, in a line, what will take a while. Raises QuantkitError before
    anything is written, except for weights and inputs that are not finite, or a model that transformers does not
    build, which are met on the way: then what was written is removed, since it cannot be continued.
    """
    started = time.monotonic()
    checkpoint, plan, spec, entries, chosen = prepare(
        source, recipe, folder, where=where, calib=calib, device=device, announce=announce
    )
    tokens = None if spec is None else read_tokens(checkpoint, recipe, spec, chosen, announce)
    summary = plan_summary(checkpoint, plan, base or source.name, tokens, chosen)
    stamps = source_stamps(checkpoint)
    if _claim(folder, summary, stamps, overwrite) is FolderState.FINISHED:
        after_bytes = sum(file.stat().st_size for file in folder.glob("model*.safetensors"))
        return _report(checkpoint, folder, after_bytes, started, chosen, was_finished=True)
    key = json.dumps([summary, stamps], sort_keys=True)
    try:
        with ShardWriter(
            folder,
            [entry.tensors for entry in entries],
            key,
            limits,
            also_needed_bytes=0 if tokens is None else _stage_needs(recipe, entries, Stage(folder)),
            needs_index=has_sidecar_tensors(plan),
        ) as writer:
            staged = NOTHING
            if tokens is not None and writer.num_done < len(entries):
                staged = calibrate_into(folder, checkpoint, plan, tokens, chosen, on_step, announce)
            _write_tensors(checkpoint, plan, entries, staged, writer, on_step)
            writer.finish()
            report = _report(checkpoint, folder, writer.num_bytes, started, chosen, was_finished=False)
            summary["linears"] = linear_notes(plan, writer.notes)
            if tokens is not None:
                summary["observed"] = writer.notes.get(OBSERVED, {})  # the text chose nothing: not journalled
            write_companions(checkpoint, plan, summary, stamps, report, writer.notes.get(SECONDS, {}))
            Stage(folder).remove()
            writer.remove_journal()
    except (SourceError, CalibrationError, UnsupportedModelError):
        remove_run(folder)
        raise
    return report


def _write_tensors(
    checkpoint: Checkpoint,
    plan: QuantPlan,
    entries: Sequence[Entry],
    staged: Staged,
    writer: ShardWriter,
    on_step: Callable[[Step], None],
) -> None:
    """Read, quantize and write what the journal does not have yet."""
    total = checkpoint.num_bytes
    done = sum(
        checkpoint.info(entry.source).num_bytes for entry in entries[: writer.num_done] if entry.source
    )
    # journalled with the first entry: the stage may be gone when they are needed
    about = {OBSERVED: staged.observed, SECONDS: staged.seconds} if staged.tensors else {}
    for entry in entries[writer.num_done :]:
        started = time.perf_counter()
        note: dict[str, Any] = {}
        if entry.tensors[0].name in staged.tensors:
            for tensor in entry.tensors:
                writer.write(tensor.name, iter_bytes(staged.tensors[tensor.name]))
            note = staged.notes.get(entry.linear.name, {}) if entry.linear else {}
        elif entry.source is None:
            for tensor in entry.tensors:  # an FP8 KV cache nobody calibrated: e4m3 holds K and V as they are
                writer.write(tensor.name, torch.ones(tensor.shape, dtype=tensor.dtype))
        elif entry.linear is None:
            writer.write(entry.source, iter_bytes(checkpoint.info(entry.source)))
        else:
            stored, sqnr = quantize_linear(checkpoint, entry.linear, plan.scale_dtype)
            for suffix, data in encode_linear(stored, entry.linear.quantized_to).items():
                writer.write(f"{entry.linear.name}.{suffix}", data)
            note = {"sqnr_db": round(sqnr, 3) if math.isfinite(sqnr) else None}
        writer.finish_entry(({entry.linear.name: note} if entry.linear else {}) | about)
        about = {}
        if entry.source:
            done += checkpoint.info(entry.source).num_bytes
            told = entry.tensors[0].name in staged.tensors  # when it was staged
            seconds = time.perf_counter() - started
            on_step(Step(entry.source, "writing", done, total, seconds, None if told else entry.linear, note))


def _stage_needs(recipe: Recipe, entries: Sequence[Entry], stage: Stage) -> int:
    """Room on disk that the stage will take beyond what it has: layers, those tuned, and what tuning keeps."""
    changed = [entry for entry in entries if entry.linear is not None or "rotate" in recipe.algorithms]
    needed = sum(tensor.num_bytes for entry in changed for tensor in entry.tensors)
    if "tune" in recipe.algorithms:
        weights = sum(entry.linear.num_weights for entry in entries if entry.linear is not None)
        needed = 2 * needed + (12 * weights if recipe.tune.codes else 0)
    return max(0, needed - stage.num_bytes)


def _claim(folder: Path, summary: dict[str, Any], stamps: list[list[Any]], overwrite: bool) -> FolderState:
    """Decide whether the folder may be written; a finished run of the same plan is left as it is."""
    state = refuse_foreign(folder)
    if state is FolderState.EMPTY:
        return state
    if overwrite or state is FolderState.HALF_REMOVED:
        remove_run(folder)
        return FolderState.EMPTY
    if state is FolderState.FINISHED and not is_same_run(folder, summary, stamps):
        raise OutputError(
            f"{folder}: holds a finished run of another plan or source, or its source has changed since",
            fix="give another folder, or --overwrite",
        )
    return state


def _report(
    checkpoint: Checkpoint,
    folder: Path,
    after_bytes: int,
    started: float,
    device: torch.device,
    *,
    was_finished: bool,
) -> QuantReport:
    return QuantReport(
        folder=folder,
        before_bytes=checkpoint.num_bytes,
        after_bytes=after_bytes,
        seconds=time.monotonic() - started,
        peak_rss_bytes=_peak_rss_bytes(),
        peak_device_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        was_finished=was_finished,
    )


def _peak_rss_bytes() -> int:
    """Peak resident memory of this process; `getrusage` would count its parent's at the time of the fork."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None, "Linux says so of every process that has memory"
    return int(found[1]) * 1024
