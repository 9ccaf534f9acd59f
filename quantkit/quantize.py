"""The story of a quantization run: read, plan, quantize, write; a tensor at a time, resumable.

Peak memory is a few tensors: weights are read in row chunks, the codes of one linear are held until they are
packed. Killed at any instant and started again, a run continues, and ends with the same bytes.
"""

import hashlib
import json
import math
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantkit import __version__
from quantkit.algorithms.rtn import rtn
from quantkit.arch import Role, place_of
from quantkit.card import first_card
from quantkit.errors import OutputError, SourceError
from quantkit.formats.checkpoint import Checkpoint, open_checkpoint, read_json
from quantkit.formats.compressed_tensors import StoredLinear, encode_linear, linear_layout
from quantkit.formats.durable import write_atomically
from quantkit.formats.folder import (
    CARD_NAME,
    LOG_NAME,
    PLAN_NAME,
    FolderState,
    check_apart,
    check_companions,
    copy_companions,
    folder_state,
    remove_run,
    write_json,
)
from quantkit.formats.kv_cache import StoredKV, kv_layout, num_kv_heads, write_kv_sidecar
from quantkit.formats.quantization_config import write_quantization
from quantkit.formats.safetensors_file import iter_bytes, tensor_bytes
from quantkit.formats.shards import DEFAULT_LIMITS, Limits, OutputTensor, ShardWriter
from quantkit.numerics.sqnr import decibels, signal_and_noise
from quantkit.recipe import LinearPlan, QuantPlan, Recipe, make_plan
from quantkit.schemes import PerBlock, PerTensor, QParams
from quantkit.schemes.labels import kv_label, scheme_label
from quantkit.schemes.tiles import dequantize_weight

CHUNK_ELEMENTS = 1 << 23


class Step(NamedTuple):
    """One tensor done. linear: the plan if it was quantized; note: what quantkit.json says of it."""

    name: str
    done_bytes: int
    total_bytes: int
    linear: LinearPlan | None
    note: Mapping[str, Any]


class QuantReport(NamedTuple):
    """What a run left: `was_finished` if it found the work done already."""

    folder: Path
    before_bytes: int
    after_bytes: int
    seconds: float
    peak_rss_bytes: int
    was_finished: bool


class Entry(NamedTuple):
    """What one tensor of the source (source None: a constant of ours) becomes in the output."""

    source: str | None
    linear: LinearPlan | None
    tensors: tuple[OutputTensor, ...]


def quantize_checkpoint(
    source: Path,
    recipe: Recipe,
    folder: Path,
    *,
    base: str | None = None,
    where: str = "recipe",
    overwrite: bool = False,
    on_step: Callable[[Step], None] = lambda step: None,
    limits: Limits = DEFAULT_LIMITS,
) -> QuantReport:
    """Quantize a checkpoint folder into another, or continue an interrupted run of the same plan.

    base: the source's name on the card. where: the recipe's name in errors. Raises QuantkitError before
    anything is written, except for weights that are not finite, which are met on the way: then what was
    written is removed, since it cannot be continued.
    """
    started = time.monotonic()
    checkpoint = open_checkpoint(source)
    plan = make_plan(checkpoint, recipe, where=where)
    entries = plan_entries(checkpoint, plan)
    check_apart(source, folder)
    check_companions(source)
    summary = _summary(checkpoint, plan, base or source.name)
    stamps = _stamps(checkpoint)
    if _claim(folder, summary, stamps, overwrite) is FolderState.FINISHED:
        after_bytes = sum(file.stat().st_size for file in folder.glob("model*.safetensors"))
        return _report(checkpoint, folder, after_bytes, started, was_finished=True)
    key = json.dumps([summary, stamps], sort_keys=True)
    try:
        with ShardWriter(folder, [entry.tensors for entry in entries], key, limits) as writer:
            _write_tensors(checkpoint, plan, entries, writer, on_step)
            writer.finish()
            report = _report(checkpoint, folder, writer.num_bytes, started, was_finished=False)
            summary["linears"] = _linears(plan, writer.notes)
            _write_companions(checkpoint, plan, summary, stamps, report)
            writer.remove_journal()
    except SourceError:
        remove_run(folder)
        raise
    return report


def plan_entries(checkpoint: Checkpoint, plan: QuantPlan) -> list[Entry]:
    """What every source tensor becomes, in the order of writing: outside the layers first, then by layer."""
    by_weight = {f"{linear.name}.weight": linear for linear in plan.linears if linear.scheme}
    entries = []
    for name, info in sorted(checkpoint.tensors.items(), key=lambda item: _position(item[0])):
        linear = by_weight.get(name)
        if linear is None:
            entries.append(Entry(name, None, (OutputTensor(name, info.dtype, info.shape),)))
            continue
        assert linear.scheme is not None, "selected above"
        layout = linear_layout(linear.scheme, *linear.shape, plan.scale_dtype)
        tensors = (OutputTensor(f"{linear.name}.{suffix}", *kind) for suffix, kind in layout.items())
        entries.append(Entry(name, linear, tuple(tensors)))
    if plan.kv is not None:
        heads = num_kv_heads(checkpoint)
        for name, kind in kv_layout(plan.kv, attention_modules(plan), heads, plan.scale_dtype).items():
            entries.append(Entry(None, None, (OutputTensor(name, *kind),)))
    counts = Counter(tensor.name for entry in entries for tensor in entry.tensors)
    doubled = [name for name, count in counts.items() if count > 1]
    if doubled:
        raise SourceError(
            f"{checkpoint.path}: holds {doubled[0]}, which is the name of a tensor of the quantized checkpoint",
            fix="start from the original 16-bit checkpoint: this one has leftovers of a quantization",
        )
    return entries


def attention_modules(plan: QuantPlan) -> dict[int, str]:
    """Full name of each layer's attention module."""
    modules = {}
    for linear in plan.linears:
        place = place_of(linear.name)
        if linear.role is Role.ATTENTION and place is not None:
            modules[place.layer] = linear.name.rpartition(".")[0]
    return modules


def quantize_linear(
    checkpoint: Checkpoint,
    linear: LinearPlan,
    scale_dtype: torch.dtype,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> tuple[StoredLinear, float]:
    """Codes and scales of one linear, and its signal-to-noise ratio in dB (float64 sums, inf if exact).

    chunk_elements: weights in float32 at a time, in whole rows; codes and scales do not depend on it.
    Raises SourceError if a weight is NaN or infinite.
    """
    assert linear.scheme is not None, "the plan quantizes it"
    spec = linear.scheme.weight
    codes, parts = [], []
    signal = noise = 0.0
    for start, stop in _row_chunks(linear, chunk_elements):
        w_NK = checkpoint.read_rows(f"{linear.name}.weight", start, stop).float()
        _check_finite(checkpoint, linear, w_NK)
        result = rtn(w_NK, spec, scale_dtype, scales=linear.scales)
        sums = signal_and_noise(w_NK, dequantize_weight(result.codes_NK, spec.granularity, result.qparams))
        signal, noise = signal + sums[0], noise + sums[1]
        codes.append(result.codes_NK)
        parts.append(result.qparams)
    zero_points = [part.zero_point for part in parts if part.zero_point is not None]
    qparams = QParams(
        torch.cat([part.scale for part in parts]), torch.cat(zero_points) if zero_points else None
    )
    return StoredLinear(torch.cat(codes), qparams), decibels(signal, noise)


def _row_chunks(linear: LinearPlan, chunk_elements: int) -> Iterator[tuple[int, int]]:
    """Row ranges that can be quantized apart: all rows at once where they share a scale."""
    assert linear.scheme is not None, "the plan quantizes it"
    num_rows, num_cols = linear.shape
    step = max(1, chunk_elements // num_cols)
    match linear.scheme.weight.granularity:
        case PerTensor():
            step = num_rows
        case PerBlock(rows, _):
            step = -(-step // rows) * rows
    for start in range(0, num_rows, step):
        yield start, min(start + step, num_rows)


def _check_finite(checkpoint: Checkpoint, linear: LinearPlan, w_NK: Tensor) -> None:
    if not torch.isfinite(w_NK).all():
        kind = "NaN" if w_NK.isnan().any() else "infinite"
        info = checkpoint.info(f"{linear.name}.weight")
        raise SourceError(
            f"{info.file}: {info.name} has {kind} weights",
            fix="fetch the checkpoint again: it is damaged; or list the linear under `ignore`",
        )


def _write_tensors(
    checkpoint: Checkpoint,
    plan: QuantPlan,
    entries: Sequence[Entry],
    writer: ShardWriter,
    on_step: Callable[[Step], None],
) -> None:
    """Read, quantize and write what the journal does not have yet."""
    total = checkpoint.num_bytes
    done = sum(
        checkpoint.info(entry.source).num_bytes for entry in entries[: writer.num_done] if entry.source
    )
    for entry in entries[writer.num_done :]:
        note: dict[str, Any] = {}
        if entry.source is None:
            for tensor in entry.tensors:  # an FP8 KV cache nobody calibrated: e4m3 holds K and V as they are
                writer.write(tensor.name, torch.ones(tensor.shape, dtype=tensor.dtype))
        elif entry.linear is None:
            writer.write(entry.source, iter_bytes(checkpoint.info(entry.source)))
        else:
            assert entry.linear.scheme is not None, "only quantized linears have an entry of their own"
            stored, sqnr = quantize_linear(checkpoint, entry.linear, plan.scale_dtype)
            for suffix, data in encode_linear(stored, entry.linear.scheme).items():
                writer.write(f"{entry.linear.name}.{suffix}", data)
            note = {"sqnr_db": round(sqnr, 3) if math.isfinite(sqnr) else None}
        writer.finish_entry({entry.linear.name: note} if entry.linear else {})
        if entry.source:
            done += checkpoint.info(entry.source).num_bytes
            on_step(Step(entry.source, done, total, entry.linear, note))


def _write_companions(
    checkpoint: Checkpoint,
    plan: QuantPlan,
    summary: dict[str, Any],
    stamps: list[list[Any]],
    report: QuantReport,
) -> None:
    """Everything but the shards; quantkit.json last, because it says that the folder is complete."""
    folder = report.folder
    copy_companions(checkpoint.path, folder)
    config = dict(checkpoint.config)
    kv = None if plan.kv is None or plan.kv.dtype != "fp8" else plan.kv
    config["quantization_config"] = write_quantization(plan.schemes, kv, extra_ignore=_other_modules(plan))
    if plan.kv is not None and plan.kv.dtype == "int8":
        write_kv_sidecar(folder, StoredKV(plan.kv, {}), attention_modules(plan))
    write_json(folder / "config.json", config)
    card = first_card(
        base=summary["source"]["name"],
        description=plan.recipe.description,
        treatments={
            name: entry["scheme"] or f"16 bits: {entry['reason']}"
            for name, entry in summary["linears"].items()
        },
        before_bytes=report.before_bytes,
        after_bytes=report.after_bytes,
        version=__version__,
    )
    write_atomically(folder / CARD_NAME, card.encode())
    log = {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds_of_last_run": round(report.seconds, 3),
        "peak_rss_bytes": report.peak_rss_bytes,
        "source_files": stamps,
    }
    write_json(folder / LOG_NAME, log)
    write_json(folder / PLAN_NAME, summary)


def _other_modules(plan: QuantPlan) -> list[str]:
    """Modules that are no decoder linears but that a loader could take for one: head, routers, vision parts.

    A tied head has no tensor of its own, but loaders make it a module called lm_head all the same.
    """
    names = [stays.name.removesuffix(".weight") for stays in plan.stays if stays.role is not Role.EMBEDDING]
    has_head = any(stays.role is Role.HEAD for stays in plan.stays)
    return names if has_head else [*names, "lm_head"]


def _summary(checkpoint: Checkpoint, plan: QuantPlan, base: str) -> dict[str, Any]:
    """What quantkit.json says before any tensor is quantized: the resolved plan."""
    headers = {name: [str(info.dtype), info.shape] for name, info in checkpoint.tensors.items()}
    digest = hashlib.sha256(json.dumps([checkpoint.config, headers], sort_keys=True).encode()).hexdigest()
    return {
        "quantkit": __version__,
        "versions": {"torch": torch.__version__},
        "source": {"name": base, "headers_sha256": digest},
        "recipe": plan.recipe.model_dump(),
        "kv_cache": None if plan.kv is None else kv_label(plan.kv),
        "linears": _linears(plan, {}),
        "kept": {stays.name: stays.reason for stays in plan.stays},
    }


def _linears(plan: QuantPlan, notes: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    result: dict[str, dict[str, Any]] = {}
    for linear in plan.linears:
        entry: dict[str, Any] = {"role": linear.role.value, "shape": list(linear.shape)}
        if linear.scheme is None:
            entry |= {"scheme": None, "reason": linear.reason}
        else:
            entry |= {
                "scheme": scheme_label(linear.scheme),
                "algorithm": plan.recipe.algorithm,
                "scales": linear.scales,
                "bits_per_weight": round(bits_per_weight(linear, plan.scale_dtype), 4),
            } | notes.get(linear.name, {})
        result[linear.name] = entry
    return result


def bits_per_weight(linear: LinearPlan, scale_dtype: torch.dtype) -> float:
    """Stored bits of a quantized linear, scales and zero points included, over its number of weights."""
    assert linear.scheme is not None, "the plan quantizes it"
    layout = linear_layout(linear.scheme, *linear.shape, scale_dtype)
    return 8 * sum(tensor_bytes(*kind) for kind in layout.values()) / (linear.shape[0] * linear.shape[1])


def _claim(folder: Path, summary: dict[str, Any], stamps: list[list[Any]], overwrite: bool) -> FolderState:
    """Decide whether the folder may be written; a finished run of the same plan is left as it is."""
    state = folder_state(folder)
    if state is FolderState.FOREIGN:
        raise OutputError(
            f"{folder}: not empty, and not a run of quantkit", fix="give a folder that does not exist yet"
        )
    if state is FolderState.EMPTY:
        return state
    if overwrite or state is FolderState.HALF_REMOVED:
        remove_run(folder)
        return FolderState.EMPTY
    if state is FolderState.FINISHED and not _is_same_run(folder, summary, stamps):
        raise OutputError(
            f"{folder}: holds a finished run of another plan or source, or its source has changed since",
            fix="give another folder, or --overwrite",
        )
    return state


def _is_same_run(folder: Path, summary: dict[str, Any], stamps: list[list[Any]]) -> bool:
    if not (folder / LOG_NAME).is_file():
        return False
    plan, log = read_json(folder / PLAN_NAME), read_json(folder / LOG_NAME)
    if not isinstance(plan, dict) or not isinstance(log, dict) or log.get("source_files") != stamps:
        return False
    return all(plan.get(key) == summary[key] for key in ("quantkit", "recipe", "source"))


def _stamps(checkpoint: Checkpoint) -> list[list[Any]]:
    """The source's weights as they are now: name, size and time of change of each file."""
    files = sorted({info.file for info in checkpoint.tensors.values()})
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _report(
    checkpoint: Checkpoint, folder: Path, after_bytes: int, started: float, *, was_finished: bool
) -> QuantReport:
    return QuantReport(
        folder=folder,
        before_bytes=checkpoint.num_bytes,
        after_bytes=after_bytes,
        seconds=time.monotonic() - started,
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        was_finished=was_finished,
    )


def _position(name: str) -> tuple[int, str]:
    place = place_of(name)
    return (-1, name) if place is None else (place.layer, name)
