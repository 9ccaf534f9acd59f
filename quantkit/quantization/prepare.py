"""What a run and its dry run both do first: read the headers, plan, and refuse what cannot work. Nothing is written."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from quantkit.arch import place_of
from quantkit.calibration.idle import idle_algorithms
from quantkit.calibration.skeleton import check_known
from quantkit.errors import OutputError, SourceError
from quantkit.formats.checkpoint import Checkpoint, open_checkpoint
from quantkit.formats.compressed_tensors import linear_layout
from quantkit.formats.folder import FolderState, check_apart, check_companions, folder_state
from quantkit.formats.kv_cache import kv_layout, num_kv_heads
from quantkit.formats.shards import OutputTensor
from quantkit.quantization.calibrated import calibration_spec, choose_device
from quantkit.quantization.record import attention_modules
from quantkit.recipe import LinearPlan, QuantPlan, Recipe, make_plan


class Entry(NamedTuple):
    """What one tensor of the source (source None: a constant of ours) becomes in the output."""

    source: str | None
    linear: LinearPlan | None
    tensors: tuple[OutputTensor, ...]


class Prepared(NamedTuple):
    """What is planned. spec: of the calibration text; None: no data is used."""

    checkpoint: Checkpoint
    plan: QuantPlan
    spec: str | None
    entries: list[Entry]
    device: torch.device


def prepare(
    source: Path,
    recipe: Recipe,
    folder: Path | None,
    *,
    where: str,
    calib: str | None,
    device: str | None,
    announce: Callable[[str], None],
) -> Prepared:
    """Plan a run; raises QuantkitError for what is known to fail. folder: of the output; None: not said yet."""
    checkpoint = open_checkpoint(source)
    spec = calibration_spec(recipe, calib, where, announce)
    plan = make_plan(checkpoint, recipe, where=where, has_data=spec is not None)
    if spec is not None:
        check_known(checkpoint)
        for line in idle_algorithms(checkpoint, plan):
            announce(line)
    entries = _entries(checkpoint, plan)
    if folder is not None:
        check_apart(source, folder)
        refuse_foreign(folder)
        check_companions(source)
    needed = device if spec is not None or device is not None else "cpu"  # without data, no GPU is touched
    return Prepared(checkpoint, plan, spec, entries, choose_device(needed))


def refuse_foreign(folder: Path) -> FolderState:
    """What is in the folder. Raises OutputError if that is not ours."""
    state = folder_state(folder)
    if state is FolderState.FOREIGN:
        raise OutputError(
            f"{folder}: not empty, and not a run of quantkit", fix="give a folder that does not exist yet"
        )
    return state


def _entries(checkpoint: Checkpoint, plan: QuantPlan) -> list[Entry]:
    """What every source tensor becomes, in the order of writing: outside the layers first, then by layer."""
    by_weight = {f"{linear.name}.weight": linear for linear in plan.quantized}
    entries = []
    for name, info in sorted(checkpoint.tensors.items(), key=lambda item: _position(item[0])):
        linear = by_weight.get(name)
        if linear is None:
            entries.append(Entry(name, None, (OutputTensor(name, info.dtype, info.shape),)))
            continue
        layout = linear_layout(linear.quantized_to, *linear.shape, plan.scale_dtype)
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


def _position(name: str) -> tuple[int, str]:
    place = place_of(name)
    return (-1, name) if place is None else (place.layer, name)
