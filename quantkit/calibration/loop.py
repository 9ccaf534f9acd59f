"""The one loop: decoder layer by decoder layer, observe, round, stage, and go on through the rounded layer.

Peak memory is one layer, its statistics, and the hidden states of all calibration tokens; of these two copies
where the plan corrects weights, because the original model then runs alongside.

Shape suffixes: S samples of a batch, L tokens of a sample, E hidden size.
"""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.arch import Role, below_layer
from quantkit.arch.pairs import layer_wiring, read_heads
from quantkit.calibration.folds import Folds
from quantkit.calibration.kv import ATTENTION, LayerKV
from quantkit.calibration.layer import LayerWork, OnLinear, Streams
from quantkit.calibration.overlap import ReadAhead, WriteBehind
from quantkit.calibration.skeleton import Call, Skeleton, run_layer, text_name
from quantkit.calibration.smoothing import smoothed, smooths
from quantkit.calibration.stopwatch import Stopwatch
from quantkit.calibration.tokens import CalibrationTokens
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.compressed_tensors import StoredLinear, decode_linear
from quantkit.formats.safetensors_file import check_finite
from quantkit.formats.stage import Stage, layer_part
from quantkit.observers import InputStats
from quantkit.recipe import LinearPlan, QuantPlan
from quantkit.schemes.tiles import dequantize_weight

WHOLE_BYTES = 4 << 30  # activations of all tokens in one layer that go through it at once
BATCH_BYTES = {"cpu": 256 << 20, "cuda": 1 << 29}  # the same of a batch, where they do not
FLOAT32_LAYER_WEIGHTS = 50_000_000  # on a GPU, layers up to this size are computed in float32 (TF32 products)
OUTSIDE = "outside"
HEAD = "lm_head.weight"  # no layer needs it
KV_SCALES = {f"{ATTENTION}.k_scale", f"{ATTENTION}.v_scale"}


def calibrate(
    checkpoint: Checkpoint,
    plan: QuantPlan,
    tokens: CalibrationTokens,
    stage: Stage,
    *,
    device: torch.device,
    on_linear: OnLinear,
) -> None:
    """Round every layer that is not staged yet, and stage it; staged layers are only run through.

    Raises UnsupportedModelError for a family that is not known, CalibrationError where no token is usable.
    """
    run = LayerRun(checkpoint, plan, tokens, device)
    unfinished = [layer for layer in range(run.skeleton.num_layers) if not stage.has(layer_part(layer))]
    if not unfinished and (stage.has(OUTSIDE) or not run.folds.changes_outside):
        return
    run.start(stage)
    for layer in range(max(unfinished, default=-1) + 1):
        if stage.has(layer_part(layer)):
            run.pass_through(layer, stage)
        else:
            run.quantize(layer, stage, on_linear)
    run.writing.wait()


class Layout(NamedTuple):
    """How tokens go through a layer: samples of a batch, whether one batch holds all, activations of a sample."""

    batch: int
    is_whole: bool
    sample_bytes: int


def layout(checkpoint: Checkpoint, plan: QuantPlan, ids_SL: Tensor, device: torch.device) -> Layout:
    """From shapes and constants alone, so that the result does not depend on how much memory is free."""
    num_samples, length = ids_SL.shape
    hidden_size = plan.linears[0].shape[1]
    inner_size = max(max(linear.shape) for linear in plan.linears)
    element_bytes = compute_dtype(checkpoint, plan, device).itemsize
    num_streams = 2 if "weight_correction" in plan.recipe.algorithms else 1
    sample_bytes = length * (4 * hidden_size + 3 * inner_size) * element_bytes * num_streams
    if num_samples * sample_bytes <= WHOLE_BYTES:
        return Layout(num_samples, True, sample_bytes)
    return Layout(max(1, BATCH_BYTES[device.type] // sample_bytes), False, sample_bytes)


def compute_dtype(checkpoint: Checkpoint, plan: QuantPlan, device: torch.device) -> torch.dtype:
    """What layers are computed in: float32, but for large models on a GPU their own dtype."""
    largest = max(sum(linear.num_weights for linear in linears) for linears in plan.layers.values())
    if device.type == "cpu" or largest <= FLOAT32_LAYER_WEIGHTS:
        return torch.float32
    return checkpoint.info(f"{plan.linears[0].name}.weight").dtype


class LayerRun:
    """Where the calibration tokens are, and the model's skeleton."""

    def __init__(
        self, checkpoint: Checkpoint, plan: QuantPlan, tokens: CalibrationTokens, device: torch.device
    ) -> None:
        self.plan = plan
        self.ids_SL = tokens.ids_SL
        self.skeleton = Skeleton(checkpoint, device, compute_dtype(checkpoint, plan, device))
        self.folds = Folds(checkpoint, plan)
        self.layout = layout(checkpoint, plan, tokens.ids_SL, device)
        self.by_layer = plan.layers
        self.streams = Streams([], None)
        self.calls: list[Call] = []
        self.watch = Stopwatch(device)
        is_beside = device.type == "cuda"
        self.reading = ReadAhead(self.skeleton.read_layer, self.skeleton.num_layers, is_ahead=is_beside)
        self.writing = WriteBehind(is_behind=is_beside)

    def start(self, stage: Stage) -> None:
        """Embed the tokens; what a rotation changes outside the layers is staged."""
        outside = {name: self.skeleton.checkpoint.read(name) for name in self.skeleton.outside_names()}
        changed = self.folds.outside(outside)
        if changed and not stage.has(OUTSIDE):
            stage.write(OUTSIDE, self.folds.rounded(changed), {})
        needed = {n: tensor for n, tensor in (outside | changed).items() if text_name(n) != HEAD}
        embedded, self.calls = self.skeleton.start(self.ids_SL, needed, self.layout.batch)
        self.skeleton.empty_outside()
        corrects = "weight_correction" in self.plan.recipe.algorithms
        self.streams = Streams(self._placed(embedded), self._placed(list(embedded)) if corrects else None)

    def pass_through(self, layer: int, stage: Stage) -> None:
        """Advance through a layer that is staged."""
        tensors = self.reading.layer(layer)
        tensors |= self._folded(layer, tensors)
        hidden, originals = self.streams
        if originals is not None:
            as_it_was = tensors | self._smoothed_again(layer, tensors)
            originals = self._advanced(layer, as_it_was, originals)
        staged = staged_layer(stage, layer, self.by_layer[layer])
        work = self._work(layer, tensors | staged.tensors, lambda linear, note, seconds: None)
        work.restore(staged.linears, staged_kv(stage, layer, self.plan) if self.plan.calibrates_kv else None)
        for number, batch in enumerate(hidden):
            hidden[number] = work.as_served(batch).to(batch.device)
        self.skeleton.empty_layer(layer)
        self.streams = Streams(hidden, originals)

    def quantize(self, layer: int, stage: Stage, on_linear: OnLinear) -> None:
        """Observe and round a layer, stage it, and advance through it."""
        with self.watch.measure("disk"):
            tensors = self.reading.layer(layer)
        with self.watch.measure("check"):
            self._check_finite(layer, tensors)
        with self.watch.measure("fold"):
            changed = self._folded(layer, tensors)
        work = self._work(layer, tensors | changed, on_linear)
        if smooths(self.plan):
            stats = work.input_stats(self.streams.hidden)
            changed |= self._smoothed(layer, tensors | changed, stats)
            work = self._work(layer, tensors | changed, on_linear)
        run = work.one_pass if self.layout.is_whole else work.in_batches
        streams = run(self.streams)
        self.streams = Streams(
            self._placed(streams.hidden), streams.originals and self._placed(streams.originals)
        )
        rounded = work.rounded_weights
        named = {
            self.skeleton.name_on_disk(layer, name): tensor
            for name, tensor in changed.items()
            if name not in rounded
        }
        with self.watch.measure("pack"):
            staged = self.folds.rounded(named) | work.stored_tensors()
        notes = work.notes() | {"seconds": self.watch.take()}
        with self.watch.measure("disk"):  # counts for the next layer
            self.writing.write(partial(stage.write, layer_part(layer), staged, notes))
        self.skeleton.empty_layer(layer)

    def _smoothed_again(self, layer: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What smoothing changed of a staged layer before it was rounded, to the bit: from the same statistics."""
        if not smooths(self.plan):
            return {}
        work = self._work(layer, tensors, lambda linear, note, seconds: None)
        stats = work.input_stats(self.streams.hidden)
        self.skeleton.empty_layer(layer)
        return self._smoothed(layer, tensors, stats)

    def _work(self, layer: int, tensors: Mapping[str, Tensor], on_linear: OnLinear) -> LayerWork:
        linears, call = self.by_layer[layer], self.calls[layer]
        return LayerWork(self.skeleton, self.plan, layer, linears, tensors, call, on_linear, self.watch)

    def _smoothed(
        self, layer: int, tensors: Mapping[str, Tensor], stats: Mapping[str, InputStats]
    ) -> dict[str, Tensor]:
        checkpoint = self.skeleton.checkpoint
        linears = {
            below_layer(linear.name): linear
            for linear in self.by_layer[layer]
            if linear.scheme is not None and linear.role is not Role.EXPERT
        }
        pairs = layer_wiring(checkpoint, layer).pairs
        changed = smoothed(self.plan, pairs, read_heads(checkpoint), tensors, linears, stats)
        kept = {
            name: tensor for name, tensor in changed.items() if name.removesuffix(".weight") not in linears
        }
        return changed | self.folds.rounded(kept)

    def _folded(self, layer: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What folding changes, in float32; what is not quantized afterwards as it will be served."""
        changed = self.folds.layer(layer, tensors)
        quantized = {f"{below_layer(one.name)}.weight" for one in self.by_layer[layer] if one.scheme}
        kept = {name: tensor for name, tensor in changed.items() if name not in quantized}
        return changed | self.folds.rounded(kept)

    def _check_finite(self, layer: int, tensors: Mapping[str, Tensor]) -> None:
        """Only what is quantized has to be finite, as in a run without data."""
        for linear in self.by_layer[layer]:
            if linear.scheme is not None:
                name = f"{linear.name}.weight"
                weight_NK = tensors[below_layer(name)].to(self.skeleton.device)  # a GPU reads it faster
                check_finite(self.skeleton.checkpoint.info(name), weight_NK)

    def _advanced(self, layer: int, tensors: Mapping[str, Tensor], hidden: list[Tensor]) -> list[Tensor]:
        module = self.skeleton.fill_layer(layer, tensors)
        device = self.skeleton.device
        for number, part in enumerate(hidden):  # in place: there may be no room for all tokens twice
            hidden[number] = run_layer(module, part.to(device), self.calls[layer]).to(part.device)
        self.skeleton.empty_layer(layer)
        return hidden

    def _placed(self, hidden: list[Tensor]) -> list[Tensor]:
        """Hidden states where they stay between layers: on the GPU only if they take little of it."""
        if self.skeleton.device.type == "cpu":
            return hidden
        num_bytes = sum(part.nbytes for part in hidden)
        total = torch.cuda.get_device_properties(self.skeleton.device).total_memory
        return hidden if num_bytes <= total // 16 else [part.cpu() for part in hidden]


class StagedLayer(NamedTuple):
    """tensors: what changes of a layer, by names below it, dequantized; linears: the quantized ones, by full names."""

    tensors: dict[str, Tensor]
    linears: dict[str, StoredLinear]


def staged_layer(stage: Stage, layer: int, linears: list[LinearPlan]) -> StagedLayer:
    """What the stage has of a layer; dequantized weights are float32."""
    staged = stage.read(layer_part(layer))
    weights: dict[str, Tensor] = {}
    stored: dict[str, StoredLinear] = {}
    for linear in linears:
        if linear.scheme is not None:
            prefix = f"{linear.name}."
            own = [name for name in staged if name.startswith(prefix) and name != f"{prefix}bias"]
            parts = {name.removeprefix(prefix): staged.pop(name) for name in own}
            one = stored[linear.name] = decode_linear(parts, linear.scheme)
            granularity = linear.scheme.weight.granularity
            weights[f"{prefix}weight"] = dequantize_weight(one.codes_NK, granularity, one.qparams)
    below = {below_layer(name): tensor for name, tensor in (weights | staged).items()}
    return StagedLayer({name: tensor for name, tensor in below.items() if name not in KV_SCALES}, stored)


def staged_kv(stage: Stage, layer: int, plan: QuantPlan) -> LayerKV:
    """How a staged layer stores its keys and values."""
    assert plan.kv is not None, "asked for by a plan that calibrates the cache"
    return LayerKV.from_note(stage.notes(layer_part(layer))["kv_cache"], plan.kv)
