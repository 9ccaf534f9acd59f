"""What calibrating would cost: seconds from counted operations and this machine's measured speed, memory from shapes.

Shape suffixes: N out_features, K in_features.
"""

import dataclasses
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch

from quantkit.algorithms.awq import NUM_RATIOS
from quantkit.algorithms.factor import factorize
from quantkit.algorithms.gptq import gptq
from quantkit.algorithms.refine import SWEEPS
from quantkit.algorithms.rtn import rtn
from quantkit.arch import Role
from quantkit.calibration.layer_learning import BATCH, STEPS
from quantkit.calibration.loop import compute_dtype, layout
from quantkit.calibration.rounding import learns
from quantkit.calibration.self_text import NOT_WRITTEN, batch_size, kv_token_bytes, text_dtype
from quantkit.calibration.smoothing import smooths
from quantkit.calibration.tokens import CalibrationTokens
from quantkit.calibration.tune import SAMPLES_AT_ONCE, schedule
from quantkit.formats.checkpoint import Checkpoint
from quantkit.recipe import LinearPlan, QuantPlan
from quantkit.schemes import IntSpec, PerChannel
from quantkit.schemes.tiles import minmax_qparams

SAMPLE_COLUMNS, SAMPLE_ROWS = 256, 128
MATMUL_SIZE = 1024
HESSIAN_SHARE = 0.58  # of a full product: the half above the diagonal is mirrored
WRITING_OVERHEAD = 3  # small products, attention over all tokens before, the head, sampling
LEARNING_PRODUCTS = 3  # a step's forward, and backward to inputs and to weights
LEARNING_BYTES = 40  # of a weight: it, its offset and shift, gradients, and what its values are computed from
FORWARD_OVERHEAD = 1.5  # norms, activations and attention beside the matmuls, which they slow down


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationCost:
    """Estimates. peak_bytes: on the host, beside the process itself; device_peak_bytes: of the GPU, None on a CPU.

    holds_model: algorithms that have the whole model in memory. passes: how often tokens go through a layer, those of
    the original model included.
    """

    text: str
    samples: int
    length: int
    tokens_sha256: str
    device: str
    passes: int
    seconds: float
    peak_bytes: int
    device_peak_bytes: int | None
    holds_model: tuple[str, ...]


def calibration_cost(
    checkpoint: Checkpoint, plan: QuantPlan, tokens: CalibrationTokens, device: torch.device
) -> CalibrationCost:
    """Count, and time a matmul and a piece of GPTQ on the device."""
    estimate = _Estimate(checkpoint, plan, tokens, device)
    needed, hidden = estimate.working_bytes(), estimate.hidden_bytes()
    has_gpu = device.type == "cuda"
    holds_model = ("self",) if estimate.writes_text else ()
    return CalibrationCost(
        text=tokens.spec,
        samples=estimate.samples,
        length=estimate.length,
        tokens_sha256=tokens.hash,
        device=device.type,
        passes=estimate.passes(),
        seconds=estimate.seconds(),
        peak_bytes=hidden + estimate.layer_bytes() if has_gpu else hidden + needed,
        device_peak_bytes=needed if has_gpu else None,
        holds_model=(*holds_model, *(name for name in plan.recipe.algorithms if name == "tune")),
    )


class _Estimate:
    """What all estimates are made from."""

    def __init__(
        self, checkpoint: Checkpoint, plan: QuantPlan, tokens: CalibrationTokens, device: torch.device
    ) -> None:
        self.checkpoint, self.plan, self.tokens, self.device = checkpoint, plan, tokens, device
        self.algorithms = plan.recipe.algorithms
        self.corrects = "weight_correction" in self.algorithms
        self.learns = learns(plan)
        self.writes_text = tokens.hash == NOT_WRITTEN
        self.samples, self.length = tokens.ids_SL.shape
        self.num_tokens = self.samples * self.length
        self.layout = layout(checkpoint, plan, tokens.ids_SL, device)
        self.dtype = compute_dtype(checkpoint, plan, device)
        self.num_weights = sum(linear.num_weights for linear in plan.linears)
        self.inputs = _inputs(plan)

    def reached(self, linear: LinearPlan) -> float:
        """Share of the tokens that a linear sees."""
        config = self.checkpoint.text_config
        total = config.get("num_local_experts", config.get("num_experts"))
        return config["num_experts_per_tok"] / total if total and linear.role is Role.EXPERT else 1.0

    def passes(self) -> int:
        """Once at all, or to observe and to advance; where weights are corrected, both models, and group by group.

        Channels are scaled by what is seen in a pass of its own.

        Where one pass rounds all, once more through the codes that were learned and the KV cache that was chosen. Where
        codes learn, the original on the same inputs unless it runs alongside, and twice to measure; steps not counted.
        """
        learning = (2 + (not self.corrects)) if self.learns else 0
        if not self.layout.is_whole:  # 7: to the inputs of 4 groups, together 2.5 layers long, and to advance
            return (7 if self.corrects else 2) + learning + smooths(self.plan)
        again = (self.plan.calibrates_kv or self.learns) and bool(self.plan.quantized)
        return 1 + self.corrects + learning + again + smooths(self.plan)

    def seconds(self) -> float:
        """Of everything, on this machine."""
        flops = self._forward_flops() + sum(map(self._rounding_flops, self.inputs))
        rounding = 0.0
        if "awq" in self.algorithms:
            rounding += sum(map(self._awq_seconds, self.inputs))
        if "gptq" in self.algorithms:
            columns = self._gptq_seconds()  # which each sweep of refine goes over again
            rounding += columns * (1 + SWEEPS) if "refine" in self.algorithms else columns
        return flops / _flops_per_second(self.device, self.dtype) + rounding

    def _forward_flops(self) -> float:
        """Of tokens through the layers: to observe and advance, to learn, to write the text."""
        seen = sum(linear.num_weights * self.reached(linear) for linear in self.plan.linears)
        flops = FORWARD_OVERHEAD * self.passes() * 2 * seen * self.num_tokens
        if self.learns:
            layers = {linear.layer for linear in self.plan.quantized if linear.role is not Role.EXPERT}
            linears = [linear for linear in self.plan.linears if linear.layer in layers]
            seen = sum(linear.num_weights * self.reached(linear) for linear in linears)
            step = 2 * seen * min(BATCH, self.samples) * self.length
            flops += STEPS * FORWARD_OVERHEAD * LEARNING_PRODUCTS * step
        if "tune" in self.algorithms:
            learning = schedule(self.plan, self.tokens, self.device, torch.get_num_threads())
            step = 8 * self.num_weights * learning.batch * self.length
            flops += learning.steps * FORWARD_OVERHEAD * step
        if self.writes_text:
            flops += WRITING_OVERHEAD * 2 * self.num_weights * self.num_tokens
        return flops

    def _rounding_flops(self, linears: list[LinearPlan]) -> float:
        """Of the second moments of an input, and of what is solved with them for its linears."""
        num_inputs, num_outputs = linears[0].shape[1], sum(linear.shape[0] for linear in linears)
        product = 2 * num_inputs**2 * self.num_tokens * self.reached(linears[0])
        flops = 0.0
        if "awq" in self.algorithms:  # observed once more; each ratio's error through all second moments
            flops += HESSIAN_SHARE * product
            if linears[0].role is not Role.EXPERT:
                flops += (NUM_RATIOS + 1) * 2 * num_outputs * num_inputs**2
        if "gptq" in self.algorithms:  # the factor in float64; blocks after the first
            flops += HESSIAN_SHARE * product + 3 * num_inputs**3 + num_outputs * num_inputs**2
        if self.corrects:
            flops += product + num_inputs**3
        return flops

    def _gptq_seconds(self) -> float:
        """Time of the columns, one after the other, of all linears: measured on some columns of each height."""
        columns: dict[int, int] = defaultdict(int)
        for linears in self.inputs:
            columns[sum(linear.shape[0] for linear in linears)] += linears[0].shape[1]
        return sum(
            count / SAMPLE_COLUMNS * _sample_seconds(num_rows, self.device)
            for num_rows, count in columns.items()
        )

    def _awq_seconds(self, linears: list[LinearPlan]) -> float:
        """Time of rounding all linears of an input at each ratio: measured on some rows."""
        if linears[0].role is Role.EXPERT:
            return 0.0
        spec, num_inputs = linears[0].quantized_to.weight, linears[0].shape[1]
        generator = torch.Generator().manual_seed(0)
        w_NK = torch.randn(SAMPLE_ROWS, num_inputs, generator=generator).to(self.device)
        importance_K = torch.ones(num_inputs, device=self.device)
        scale_dtype = self.plan.scale_dtype
        seconds = _timed(
            lambda: rtn(w_NK, spec, scale_dtype, scales="importance", importance_K=importance_K), self.device
        )
        return (NUM_RATIOS + 1) * seconds * sum(linear.shape[0] for linear in linears) / SAMPLE_ROWS

    def hidden_bytes(self) -> int:
        """Hidden states before and after a layer, of one model or of two; where codes learn, the outputs too."""
        copies = 4 if self.corrects else 2 + self.learns
        hidden_size = self.plan.linears[0].shape[1]
        return copies * self.num_tokens * hidden_size * self.dtype.itemsize

    def layer_bytes(self) -> int:
        """The largest layer as it is on disk."""
        return max(map(self._stored_bytes, self.plan.layers.values()))

    def _stored_bytes(self, linears: Iterable[LinearPlan]) -> int:
        return sum(self.checkpoint.info(f"{linear.name}.weight").num_bytes for linear in linears)

    def working_bytes(self) -> int:
        """Beside the hidden states, at the worst moment: outside tensors, a layer, its activations and statistics."""
        as_computed = 1 + self.dtype.itemsize / self._stored_itemsize()  # both are there for a moment
        outside = (self.checkpoint.num_bytes - self._stored_bytes(self.plan.linears)) * as_computed
        resident = outside + self.layer_bytes() * as_computed + self._statistics_bytes()
        working = resident + self.layout.batch * self.layout.sample_bytes
        if self.learns:
            working = max(working, resident + self._learning_bytes())
        if "tune" in self.algorithms:
            working = max(working, self._tune_bytes())
        if self.writes_text:
            working = max(working, self._writing_bytes())
        return int(working)

    def _stored_itemsize(self) -> int:
        return self.checkpoint.info(f"{self.plan.linears[0].name}.weight").dtype.itemsize

    def _statistics_bytes(self) -> int:
        """Second moments of one input or of all of a layer, and the factor of one, in float64."""
        matrices = ("gptq" in self.algorithms) + self.corrects
        by_layer: dict[int, list[int]] = defaultdict(list)
        for linears in self.inputs:
            if linears[0].role is not Role.EXPERT:
                by_layer[linears[0].layer].append(4 * matrices * linears[0].shape[1] ** 2)
        one_by_one = self.layout.is_whole and not self.learns
        at_once = max((max(sizes) if one_by_one else sum(sizes) for sizes in by_layer.values()), default=0)
        largest = max((linears[0].shape[1] for linears in self.inputs), default=0)
        return at_once + (24 * largest**2 if matrices else 0)

    def _learning_bytes(self) -> int:
        """What the largest layer learns with, and a batch's activations, kept for the way back."""
        weights: dict[int, int] = defaultdict(int)
        for linear in self.plan.quantized:
            if linear.role is not Role.EXPERT:
                weights[linear.layer] += linear.num_weights
        batch_bytes = min(BATCH, self.samples) * self.layout.sample_bytes
        return LEARNING_BYTES * max(weights.values(), default=0) + 2 * batch_bytes

    def _tune_bytes(self) -> int:
        """Both models in float32, and 16 bytes for each weight that learns; logits of a part of a batch."""
        tune = self.plan.recipe.tune
        all_weights = self.checkpoint.num_bytes // self._stored_itemsize()
        vocabulary = int(self.checkpoint.text_config["vocab_size"])
        samples = min(tune.batch, self.samples, SAMPLES_AT_ONCE[self.device.type])
        logits = 6 * 4 * samples * self.length * vocabulary
        return 4 * all_weights + (24 if tune.codes else 8) * self.num_weights + logits

    def _writing_bytes(self) -> int:
        """The model, and keys, values and predictions of a batch of sequences."""
        batch = batch_size(self.checkpoint, self.samples, self.length, self.device)
        weights = sum(math.prod(info.shape) for info in self.checkpoint.tensors.values())
        predictions = 16 * int(self.checkpoint.text_config["vocab_size"])
        cache = kv_token_bytes(self.checkpoint, self.device) * self.length
        return weights * text_dtype(self.checkpoint, self.device).itemsize + batch * (cache + predictions)


def _inputs(plan: QuantPlan) -> list[list[LinearPlan]]:
    """Quantized linears by the input they share; an expert's gate and up."""
    inputs: dict[tuple[str, int], list[LinearPlan]] = defaultdict(list)
    for linear in plan.quantized:
        own = linear.name.rpartition(".")[0] if linear.role is Role.EXPERT else linear.group
        inputs[own, linear.shape[1]].append(linear)
    return list(inputs.values())


def _sample_seconds(num_rows: int, device: torch.device) -> float:
    generator = torch.Generator().manual_seed(0)
    w_NK = torch.randn(num_rows, SAMPLE_COLUMNS, generator=generator).to(device)
    spec = IntSpec(bits=4, granularity=PerChannel())
    factor = factorize(torch.eye(SAMPLE_COLUMNS, device=device))
    assert factor is not None, "the identity can be factorized"
    qparams = minmax_qparams(w_NK, spec, torch.float32)
    gptq(w_NK[:, :2], factorize(torch.eye(2, device=device)) or factor, spec, qparams)  # what is slow once
    return _timed(lambda: gptq(w_NK, factor, spec, qparams), device)


def _flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    a = torch.ones(MATMUL_SIZE, MATMUL_SIZE, dtype=dtype, device=device)
    _timed(lambda: a @ a, device)
    return 2 * MATMUL_SIZE**3 * 4 / _timed(lambda: [a @ a for _ in range(4)], device)


def _timed(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
