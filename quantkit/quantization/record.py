"""What a run says about itself: the resolved plan (quantkit.json), its identity, and the rest of the folder."""

import hashlib
import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from quantkit.arch import Role, Stays, place_of
from quantkit.calibration.kv import LayerKV
from quantkit.calibration.tokens import CalibrationTokens
from quantkit.card import first_card
from quantkit.formats.checkpoint import Checkpoint, read_json
from quantkit.formats.compressed_tensors import linear_layout
from quantkit.formats.durable import write_atomically
from quantkit.formats.folder import CARD_NAME, LOG_NAME, PLAN_NAME, copy_companions, write_json
from quantkit.formats.kv_cache import StoredKV, write_kv_sidecar
from quantkit.formats.quantization_config import write_quantization
from quantkit.formats.safetensors_file import tensor_bytes
from quantkit.recipe import LinearPlan, QuantPlan
from quantkit.schemes.labels import kv_label, scheme_label
from quantkit.version import __version__

OBSERVED, SECONDS = "observed", "seconds"  # among the notes of linears: what calibration says of itself


class QuantReport(NamedTuple):
    """What a run left: `was_finished` if it found the work done already. peak_device_bytes: None on a CPU."""

    folder: Path
    before_bytes: int
    after_bytes: int
    seconds: float
    peak_rss_bytes: int
    peak_device_bytes: int | None
    was_finished: bool


def plan_summary(
    checkpoint: Checkpoint,
    plan: QuantPlan,
    base: str,
    tokens: CalibrationTokens | None,
    device: torch.device,
) -> dict[str, Any]:
    """What quantkit.json says before any tensor is quantized: the resolved plan."""
    headers = {name: [str(info.dtype), info.shape] for name, info in checkpoint.tensors.items()}
    digest = hashlib.sha256(json.dumps([checkpoint.config, headers], sort_keys=True).encode()).hexdigest()
    return {
        "quantkit": __version__,
        "versions": {"torch": torch.__version__},
        "source": {"name": base, "headers_sha256": digest},
        "recipe": plan.recipe.model_dump(),
        "calibration": None if tokens is None else _calibration(tokens, device),
        "kv_cache": None if plan.kv is None else kv_label(plan.kv),
        "linears": linear_notes(plan, {}),
        "kept": {stays.name: stays.reason for stays in plan.stays},
    }


def _calibration(tokens: CalibrationTokens, device: torch.device) -> dict[str, Any]:
    samples, length = tokens.ids_SL.shape
    return {
        "text": tokens.spec,
        "samples": samples,
        "length": length,
        "tokens_sha256": tokens.hash,
        "device": device.type,
        "transformers": transformers.__version__,
        **({} if tokens.roles is None else {"roles": tokens.roles}),
    }


def linear_notes(plan: QuantPlan, notes: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    result: dict[str, dict[str, Any]] = {}
    for linear in plan.linears:
        entry: dict[str, Any] = {"role": linear.role.value, "shape": list(linear.shape)}
        if linear.scheme is None:
            entry |= {"scheme": None, "reason": linear.reason}
        else:
            entry |= {
                "scheme": scheme_label(linear.scheme),
                "algorithm": "rtn",
                "scales": linear.scales,
                "bits_per_weight": round(bits_per_weight(linear, plan.scale_dtype), 4),
            } | notes.get(linear.name, {})
        result[linear.name] = entry
    return result


def bits_per_weight(linear: LinearPlan, scale_dtype: torch.dtype) -> float:
    """Stored bits of a quantized linear, scales and zero points included, over its number of weights."""
    layout = linear_layout(linear.quantized_to, *linear.shape, scale_dtype)
    return 8 * sum(tensor_bytes(*kind) for kind in layout.values()) / linear.num_weights


def is_same_run(folder: Path, summary: dict[str, Any], stamps: list[list[Any]]) -> bool:
    """Whether a finished folder came of this plan, from the source files as they are now."""
    if not (folder / LOG_NAME).is_file():
        return False
    plan, log = read_json(folder / PLAN_NAME), read_json(folder / LOG_NAME)
    if not isinstance(plan, dict) or not isinstance(log, dict) or log.get("source_files") != stamps:
        return False
    return all(plan.get(key) == summary[key] for key in ("quantkit", "recipe", "source", "calibration"))


def source_stamps(checkpoint: Checkpoint) -> list[list[Any]]:
    """The source's weights as they are now: name, size and time of change of each file."""
    files = sorted({info.file for info in checkpoint.tensors.values()})
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def write_companions(
    checkpoint: Checkpoint,
    plan: QuantPlan,
    summary: dict[str, Any],
    stamps: list[list[Any]],
    report: QuantReport,
    seconds: Mapping[str, Any],
) -> None:
    """Everything but the shards; quantkit.json last, because it says that the folder is complete."""
    folder = report.folder
    copy_companions(checkpoint.path, folder)
    config = dict(checkpoint.config)
    kv = _stored_kv(plan, summary)
    in_config = None if kv is None or kv.is_in_sidecar else kv.scheme
    config["quantization_config"] = write_quantization(
        plan.schemes, in_config, extra_ignore=_other_modules(plan)
    )
    if kv is not None and kv.is_in_sidecar:
        write_kv_sidecar(folder, kv, attention_modules(plan))
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
        "seconds_of_calibration": seconds,
        "peak_rss_bytes": report.peak_rss_bytes,
        "peak_device_bytes": report.peak_device_bytes,
        "source_files": stamps,
    }
    write_json(folder / LOG_NAME, log)
    write_json(folder / PLAN_NAME, summary)


def _stored_kv(plan: QuantPlan, summary: Mapping[str, Any]) -> StoredKV | None:
    """The KV cache as the calibrated layers want it, or as the plan says where none was."""
    if plan.kv is None:
        return None
    if not plan.calibrates_kv:
        return StoredKV(plan.kv, {})
    layers = {
        int(part): LayerKV.from_note(note, plan.kv) for part, note in summary["observed"]["kv_cache"].items()
    }
    kept = frozenset(layer for layer, kv in layers.items() if kv.stays)
    return StoredKV(plan.kv, {layer: kv.scales for layer, kv in layers.items()}, kept)


def has_sidecar_tensors(plan: QuantPlan) -> bool:
    """Whether scales of the KV cache will lie beside the shards, where a loader could take them for one."""
    return plan.kv is not None and plan.kv.dtype == "int8" and plan.calibrates_kv


def attention_modules(plan: QuantPlan) -> dict[int, str]:
    """Full name of each layer's attention module."""
    return {
        linear.layer: linear.name.rpartition(".")[0]
        for linear in plan.linears
        if linear.role is Role.ATTENTION
    }


def _other_modules(plan: QuantPlan) -> list[str]:
    """Modules that are no decoder linears but that a loader could take for one: head, routers, vision parts.

    A tied head has no tensor of its own, and one of a nested model another name on disk, but loaders make it a
    module called lm_head all the same.
    """
    modules = [stays for stays in plan.stays if stays.role is not Role.EMBEDDING]
    is_nested = any("language_model." in linear.name for linear in plan.linears)
    head = r"re:(.*\.)?lm_head$" if is_nested else "lm_head"
    has_head = any(stays.role is Role.HEAD for stays in plan.stays) and not is_nested
    return list(dict.fromkeys([*map(_ignored, modules), *([] if has_head else [head])]))


def _ignored(stays: Stays) -> str:
    """A module's name; of a part beside the language model all of it, wherever a loader hangs it."""
    if stays.role is Role.OTHER and place_of(stays.name) is None:
        part = stays.name.removeprefix("model.").split(".")[0]
        return rf"re:(.*\.)?{re.escape(part)}(\.|$)"
    return stays.name.removesuffix(".weight")
