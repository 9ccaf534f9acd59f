"""Scales, norms and codes learned end to end: the quantized model's predictions drawn to the original's.

The loss is KL(original ‖ quantized) of the next token, over all calibration tokens. A scale learns a relative
change, a norm likewise; a code learns a position between codes, of which the nearest code is what computes, with
the gradient passed straight through (arXiv:1308.3432). Nothing in the file format changes.

Holds the whole model: the original, and for each weight that learns 16 bytes (position, gradient, two moments).

Shape suffixes: S samples, L tokens of a sample, V vocabulary, N out_features, K in_features.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import log_softmax

from quantkit.arch import Role, place_of
from quantkit.arch.pairs import WIRINGS, Link
from quantkit.calibration.deterministic import deterministic_sums
from quantkit.calibration.folds import Folds
from quantkit.calibration.learned import LearnedNorm, LearnedWeight
from quantkit.calibration.skeleton import Skeleton, text_name, to_module_names
from quantkit.calibration.smoothing import smooths
from quantkit.calibration.tokens import CalibrationTokens
from quantkit.errors import CalibrationError
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.compressed_tensors import decode_linear
from quantkit.formats.stage import Stage, layer_part
from quantkit.recipe import LinearPlan, QuantPlan
from quantkit.schemes.tiles import dequantize_weight

SCALE_RATE, NORM_RATE, CODE_RATE = 1e-3, 1e-3, 1e-3  # relative, relative, in steps of the code
BETAS = (0.9, 0.99)
WARM_UP_STEPS = 20
STEPS_BEFORE_RECORDING = 3
KEEP_SECONDS = 120.0
# Samples whose activations and logits are in memory together: of a batch, one part after the other.
SAMPLES_AT_ONCE = {"cpu": 2, "cuda": 8}
TUNING, TUNED = "tuning", "tuned"
# What a budget in minutes is translated with; low enough to hold on most machines of the kind.
FLOPS = {"cpu": 30e9, "cuda": 60e12}  # of a CPU: per thread

OnTuned = Callable[[int, int, float], None]


class Schedule(NamedTuple):
    """steps: in total; batch: samples of a step; per_epoch: steps after which all tokens have been seen."""

    steps: int
    batch: int
    per_epoch: int


def tune(
    checkpoint: Checkpoint,
    plan: QuantPlan,
    tokens: CalibrationTokens,
    stage: Stage,
    *,
    device: torch.device,
    on_step: OnTuned,
) -> None:
    """Learn from the staged layers, and stage the result as `tuned`; continues where an earlier call was killed.

    on_step: told step, steps and loss.
    """
    if stage.has(TUNED):
        return
    run = TuneRun(checkpoint, plan, tokens, stage, device)
    run.resume(stage)
    kept_at = time.monotonic()
    with deterministic_sums():
        run.record()
        while run.step < run.schedule.steps:
            loss = run.learn()
            on_step(run.step, run.schedule.steps, loss)
            if time.monotonic() - kept_at > KEEP_SECONDS and run.step < run.schedule.steps:
                run.keep(stage)
                kept_at = time.monotonic()
    stage.write(TUNED, run.stored_tensors(), {"linears": run.notes(), "excluded": run.num_excluded})
    stage.drop(TUNING)


def schedule(plan: QuantPlan, tokens: CalibrationTokens, device: torch.device, num_threads: int) -> Schedule:
    """How long to learn: by the recipe's epochs, cut to its budget by an estimate of this kind of device's speed."""
    settings = plan.recipe.tune
    num_samples, length = tokens.ids_SL.shape
    batch = min(settings.batch, num_samples)
    per_epoch = max(1, num_samples // batch)
    steps = settings.epochs * per_epoch
    if plan.recipe.budget_minutes is not None:
        weights = sum(linear.num_weights for linear in plan.linears)
        # the original's forward; forward, and backward twice, of the other
        flops_per_step = 8 * weights * batch * length
        flops = FLOPS[device.type] * (num_threads if device.type == "cpu" else 1)
        steps = min(steps, max(1, int(60 * plan.recipe.budget_minutes * flops / flops_per_step)))
    return Schedule(steps, batch, per_epoch)


class TuneRun:
    """The state of learning: parameters, optimizer, and how far it is."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: QuantPlan,
        tokens: CalibrationTokens,
        stage: Stage,
        device: torch.device,
    ) -> None:
        self._plan = plan
        self._device = device
        self._length = tokens.ids_SL.shape[1]
        self._skeleton = Skeleton(checkpoint, device, torch.float32)
        self._model_type = checkpoint.model_type
        self._linears = {linear.name: linear for linear in plan.quantized}
        self._weights: dict[str, LearnedWeight] = {}
        self._norms: dict[str, LearnedNorm] = {}
        self._settled: dict[str, Tensor] = {}
        self._read(checkpoint, stage)
        usable = self._usable(tokens, stage)
        self.num_excluded = tokens.ids_SL.numel() - usable.ids_SL.numel()
        self._ids = usable.ids_SL.flatten().to(device)
        self.schedule = schedule(plan, usable, device, torch.get_num_threads())
        self._optimizer = self._new_optimizer()
        self._ids_SL = torch.zeros(self.schedule.batch, self._length, dtype=self._ids.dtype, device=device)
        self._loss = torch.zeros((), device=device)
        self._compute: Callable[[], None] = self._compute_step
        self.step = 0

    def learn(self) -> float:
        """One step; returns the mean KL of its tokens, in nats. Raises CalibrationError where that is no number."""
        self._set_rate()
        self._ids_SL.copy_(self._batch())
        self._compute()
        self.step += 1
        loss = float(self._loss)
        if not math.isfinite(loss):  # and so is all that has learned from it
            raise CalibrationError(
                f"tune: step {self.step} of {self.schedule.steps} has a KL of {loss}: the model's predictions overflow",
                fix="look at the model's weights; or leave `tune` out of `algorithm`",
            )
        return loss

    def _compute_step(self) -> None:
        """Loss, gradients and the optimizer's step for the tokens in place; everything stays where it is in memory."""
        self._loss.zero_()
        for ids_SL in torch.split(self._ids_SL, SAMPLES_AT_ONCE[self._device.type]):
            loss = self._kl(ids_SL) * (len(ids_SL) / len(self._ids_SL))
            torch.autograd.backward(loss)
            self._loss += loss.detach()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=False)

    def _kl(self, ids_SL: Tensor) -> Tensor:
        """The mean over these tokens, in nats."""
        with torch.no_grad():
            target_SLV = log_softmax(self._logits({}, ids_SL), dim=-1)
        found_SLV = log_softmax(self._logits(self._quantized(), ids_SL), dim=-1)
        return (target_SLV.exp() * (target_SLV - found_SLV)).sum(dim=-1).mean()

    def record(self) -> None:
        """Make a CUDA graph of a step, whose ten thousand kernels are then launched at once.

        Does nothing on a CPU, and nothing for experts: how many tokens are routed to each is not known before.
        """
        if self._device.type != "cuda" or any(linear.role is Role.EXPERT for linear in self._plan.linears):
            return
        before = self._state()
        for group in self._optimizer.param_groups:
            group["lr"].zero_()
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(STEPS_BEFORE_RECORDING):
                self._compute_step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._compute_step()
        self._restore(before)
        self._compute = graph.replay

    def keep(self, stage: Stage) -> None:
        """Put everything that learning depends on into the stage."""
        stage.write(TUNING, self._state(), {"step": self.step, "steps": self.schedule.steps})

    def resume(self, stage: Stage) -> None:
        """Take up what `keep` left, if anything."""
        if not stage.has(TUNING):
            return
        said = stage.notes(TUNING)
        self.step = said["step"]
        # a budget is translated by the number of threads, which may have changed since
        self.schedule = self.schedule._replace(steps=said["steps"])
        self._restore(stage.read(TUNING))

    def stored_tensors(self) -> dict[str, Tensor]:
        """Every tensor that has learned, under its final name, on the CPU."""
        tensors: dict[str, Tensor] = {}
        for name, weight in self._weights.items():
            tensors |= {f"{name}.{suffix}": part for suffix, part in weight.stored().items()}
        for name, norm in self._norms.items():
            tensors[name] = norm.stored()
        return tensors

    def notes(self) -> dict[str, dict[str, float]]:
        """What quantkit.json says of each linear: the share of codes that changed."""
        return {name: {"tuned_codes": weight.changed_share()} for name, weight in self._weights.items()}

    def _state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for name, parameter in self._parameters():
            moments = self._optimizer.state[parameter]
            state[name] = parameter.detach().cpu()
            state[f"{name}.mean"] = moments["exp_avg"].cpu()
            state[f"{name}.square"] = moments["exp_avg_sq"].cpu()
        return state

    def _restore(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self._parameters():
                parameter.copy_(state[name])
                moments = self._optimizer.state[parameter]
                moments["step"].fill_(self.step)
                moments["exp_avg"].copy_(state[f"{name}.mean"])
                moments["exp_avg_sq"].copy_(state[f"{name}.square"])

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, weight in self._weights.items():
            yield f"{name}.scale", weight.change
            if weight.position_NK is not None:
                yield f"{name}.code", weight.position_NK
        for name, norm in self._norms.items():
            yield name, norm.change

    def _new_optimizer(self) -> torch.optim.Adam:
        codes = [weight.position_NK for weight in self._weights.values() if weight.position_NK is not None]
        groups: list[dict[str, Any]] = [
            {"params": [weight.change for weight in self._weights.values()], "rate": SCALE_RATE},
            {"params": [norm.change for norm in self._norms.values()], "rate": NORM_RATE},
            {"params": codes, "rate": CODE_RATE},
        ]
        for group in groups:  # a tensor, because a recording reads it where it is
            group["lr"] = torch.zeros((), device=self._device)
        used = [group for group in groups if group["params"]]
        is_gpu = self._device.type == "cuda"
        optimizer = torch.optim.Adam(used, betas=BETAS, fused=True, capturable=is_gpu)
        for _, parameter in self._parameters():
            # what the first step would make: it has to be there to be restored into, and stay where it is
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=self._device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
            parameter.grad = torch.zeros_like(parameter)
        return optimizer

    def _set_rate(self) -> None:
        """Cosine from the full rate to 0, after a few steps of warming up."""
        share = 0.5 * (1 + math.cos(math.pi * self.step / self.schedule.steps))
        share *= min(1.0, (self.step + 1) / WARM_UP_STEPS)
        for group in self._optimizer.param_groups:
            group["lr"].fill_(group["rate"] * share)

    def _batch(self) -> Tensor:
        """Windows of this step: the epoch's order and offset follow from seed and epoch alone."""
        epoch, number = divmod(self.step, self.schedule.per_epoch)
        generator = torch.Generator().manual_seed(1_000_003 * self._plan.recipe.seed + epoch)
        num_windows = len(self._ids) // self._length
        room = len(self._ids) - (num_windows - 1) * self._length if num_windows > self.schedule.batch else 1
        offset = int(torch.randint(0, room, (1,), generator=generator))
        count = (len(self._ids) - offset) // self._length
        windows_SL = self._ids[offset : offset + count * self._length].view(count, self._length)
        order = torch.randperm(count, generator=generator)
        order = torch.cat([order, order])  # the offset cost a window: the last batch sees one again
        first = number * self.schedule.batch
        return windows_SL[order[first : first + self.schedule.batch].to(self._device)]

    @torch.no_grad()
    def _usable(self, tokens: CalibrationTokens, stage: Stage) -> CalibrationTokens:
        """The windows of which both models predict numbers: a single NaN would be in every gradient.

        They are only looked for where a layer had to leave out tokens. Raises CalibrationError if there are none.
        """
        parts = [layer_part(layer) for layer in range(self._skeleton.num_layers)]
        if not any(stage.notes(part).get("excluded") for part in parts):
            return tokens
        quantized = self._quantized()
        is_finite_S = torch.tensor(
            [
                all(bool(self._logits(model, ids_1L).isfinite().all()) for model in ({}, quantized))
                for ids_1L in torch.split(tokens.ids_SL.to(self._device), 1)
            ]
        )
        if not bool(is_finite_S.any()):
            raise CalibrationError(
                f"tune: of all {len(is_finite_S)} calibration windows the model predicts NaN or Inf",
                fix="look at the model's weights; or leave `tune` out of `algorithm`",
            )
        return tokens._replace(ids_SL=tokens.ids_SL[is_finite_S])

    def _logits(self, tensors: Mapping[str, Tensor], ids_SL: Tensor) -> Tensor:
        is_gpu = self._device.type == "cuda"
        # nothing is kept from one forward pass to the next: a recording has to compute all of it
        with torch.autocast(self._device.type, torch.bfloat16, enabled=is_gpu, cache_enabled=False):
            arguments = {"input_ids": ids_SL, "use_cache": False}
            logits_SLV: Tensor = functional_call(self._skeleton.model, dict(tensors), (), arguments).logits
        return logits_SLV.float()

    def _quantized(self) -> dict[str, Tensor]:
        """The tensors in which the quantized model differs from the original, by their names in transformers."""
        learned = {f"{name}.weight": weight.value() for name, weight in self._weights.items()}
        learned |= {name: norm.value() for name, norm in self._norms.items()}
        learned |= self._settled
        named: dict[str, Tensor] = {}
        by_layer: dict[int, dict[str, Tensor]] = defaultdict(dict)
        for name, tensor in learned.items():
            place = place_of(name)
            if place is None:
                named[text_name(name)] = tensor
            else:
                by_layer[place.layer][name.removeprefix(place.prefix)] = tensor
        for layer, tensors in by_layer.items():
            modules = to_module_names(tensors, self._model_type)
            named |= {f"model.layers.{layer}.{name}": tensor for name, tensor in modules.items()}
        return named

    def _read(self, checkpoint: Checkpoint, stage: Stage) -> None:
        """Fill the model with the original's weights; start what learns from the staged layers."""
        folds = Folds(checkpoint, self._plan)
        outside = {name: checkpoint.read(name) for name in self._skeleton.outside_names()}
        outside |= folds.outside(outside)
        self._skeleton.fill_outside(outside)
        for name, tensor in outside.items():
            if tensor.ndim == 1:
                self._norms[name] = self._new_norm(tensor)
        for layer in range(self._skeleton.num_layers):
            tensors = self._skeleton.read_layer(layer)
            tensors |= folds.layer(layer, tensors)
            self._skeleton.fill_layer(layer, tensors)
            staged = stage.read(layer_part(layer))
            for name, tensor in tensors.items():
                full = self._skeleton.name_on_disk(layer, name)
                if tensor.ndim == 1 and name.endswith("norm.weight"):
                    self._norms[full] = self._new_norm(staged.get(full, tensor))
                linear = self._linears.get(full.removesuffix(".weight"))
                if linear is not None:
                    self._weights[linear.name] = self._new_weight(linear, staged, tensor)
            self._settled |= self._settled_in(layer, tensors, staged)

    def _settled_in(
        self, layer: int, tensors: Mapping[str, Tensor], staged: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """What differs from the original and does not learn: corrected biases, routers behind a scaled norm."""
        full_names = {name: self._skeleton.name_on_disk(layer, name) for name in tensors}
        names = {
            name: full
            for name, full in full_names.items()
            if full in staged
            and full not in self._norms
            and full.removesuffix(".weight") not in self._weights
        }
        experts = {name: full for name, full in full_names.items() if _is_of_expert(full)}
        if names.keys() & experts.keys():  # which are one module, so it is all of them or none
            names |= experts
        return {
            full: staged.get(full, tensors[name]).to(self._device, torch.float32)
            for name, full in names.items()
        }

    def _new_weight(self, linear: LinearPlan, staged: Mapping[str, Tensor], tensor: Tensor) -> LearnedWeight:
        prefix, scheme = f"{linear.name}.", linear.quantized_to
        parts = {name.removeprefix(prefix): part for name, part in staged.items() if name.startswith(prefix)}
        stored = decode_linear(parts, scheme)
        if smooths(self._plan):
            # what was rounded is not what the original has: positions start at their codes
            tensor = dequantize_weight(stored.codes_NK, scheme.weight.granularity, stored.qparams)
        return LearnedWeight(stored, scheme, tensor.to(self._device), with_codes=self._plan.recipe.tune.codes)

    def _new_norm(self, tensor: Tensor) -> LearnedNorm:
        links = {pair.link for pair in WIRINGS[self._model_type].pairs}
        offset = 1.0 if Link.NORM_PLUS_ONE in links else 0.0
        return LearnedNorm(tensor.to(self._device), offset, self._plan.scale_dtype)


def _is_of_expert(name: str) -> bool:
    place = place_of(name)
    return place is not None and place.expert is not None
