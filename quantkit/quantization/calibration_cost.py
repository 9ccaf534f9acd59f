"""What calibrating would cost: seconds from counted operations and this machine's measured speed, memory from shapes.

Shape suffixes: N out_features, K in_features.
"""

import dataclasses
import math
import time
from collections import defaultdict
from collections.abc import Callable

import torch

from quantkit.algorithms.awq import NUM_RATIOS
from quantkit.algorithms.factor import factorize
from quantkit.algorithms.gptq import gptq
from quantkit.algorithms.refine import SWEEPS
from quantkit.algorithms.rtn import rtn
from quantkit.arch import Role
from quantkit.calibration.layer_learning import BATCH, STEPS
from quantkit.calibration.loop import compute_dtype, layer_of_linear, layout
from quantkit.calibration.rounding import learns
from quantkit.calibration.self_text import NOT_WRITTEN, batch_size, kv_token_bytes, text_dtype
from quantkit.calibration.smoothing import smooths
from quantkit.calibration.tokens import CalibrationTokens
from quantkit.calibration.tune import schedule
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
    samples, length = tokens.ids_SL.shape
    found = layout(checkpoint, plan, tokens.ids_SL, device)
    needed = _working_bytes(checkpoint, plan, tokens, device)
    hidden = _hidden_bytes(checkpoint, plan, tokens, device)
    has_gpu = device.type == "cuda"
    return CalibrationCost(
        text=tokens.spec,
        samples=samples,
        length=length,
        tokens_sha256=tokens.hash,
        device=device.type,
        passes=_passes(plan, found.is_whole),
        seconds=_seconds(checkpoint, plan, tokens, device),
        peak_bytes=hidden + _layer_bytes(checkpoint, plan) if has_gpu else hidden + needed,
        device_peak_bytes=needed if has_gpu else None,
        holds_model=(*(["self"] if tokens.hash == NOT_WRITTEN else []), *_that_hold_the_model(plan)),
    )


def _that_hold_the_model(plan: QuantPlan) -> list[str]:
    return [name for name in plan.recipe.algorithms if name == "tune"]


def _seconds(
    checkpoint: Checkpoint, plan: QuantPlan, tokens: CalibrationTokens, device: torch.device
) -> float:
    algorithms = plan.recipe.algorithms
    passes = _passes(plan, layout(checkpoint, plan, tokens.ids_SL, device).is_whole)
    num_tokens = tokens.ids_SL.numel()
    share = _expert_share(checkpoint)
    flops = 0.0
    for linear in plan.linears:
        reached = share if linear.role is Role.EXPERT else 1.0
        flops += FORWARD_OVERHEAD * passes * 2 * linear.shape[0] * linear.shape[1] * num_tokens * reached
    rounding = 0.0
    for linears in _inputs(plan):
        num_inputs, num_outputs = linears[0].shape[1], sum(linear.shape[0] for linear in linears)
        reached = share if linears[0].role is Role.EXPERT else 1.0
        if "awq" in algorithms:  # observed once more, and the error of each ratio through all second moments
            flops += HESSIAN_SHARE * 2 * num_inputs**2 * num_tokens * reached
            if linears[0].role is not Role.EXPERT:
                flops += (NUM_RATIOS + 1) * 2 * num_outputs * num_inputs**2
                rounding += _awq_seconds(plan, linears, device)
        if "gptq" in algorithms:
            flops += HESSIAN_SHARE * 2 * num_inputs**2 * num_tokens * reached
            flops += (
                3 * num_inputs**3 + num_outputs * num_inputs**2
            )  # factor in float64; blocks after the first
        if "weight_correction" in algorithms:
            flops += 2 * num_inputs**2 * num_tokens * reached + num_inputs**3
    if "gptq" in algorithms:
        columns = _gptq_seconds(plan, device)  # which each sweep of refine goes over again
        rounding += columns * (1 + SWEEPS) if "refine" in algorithms else columns
    if learns(plan):
        flops += _learning_flops(plan, tokens, share)
    if "tune" in algorithms:
        learning = schedule(plan, tokens, device, torch.get_num_threads())
        weights = sum(linear.shape[0] * linear.shape[1] for linear in plan.linears)
        flops += learning.steps * FORWARD_OVERHEAD * 8 * weights * learning.batch * tokens.ids_SL.shape[1]
    if tokens.hash == NOT_WRITTEN:
        flops += WRITING_OVERHEAD * 2 * sum(math.prod(linear.shape) for linear in plan.linears) * num_tokens
    return flops / _flops_per_second(device, compute_dtype(checkpoint, plan, device)) + rounding


def _learning_flops(plan: QuantPlan, tokens: CalibrationTokens, expert_share: float) -> float:
    """Of all steps in all layers that have something to learn."""
    samples, length = tokens.ids_SL.shape
    learning = {layer_of_linear(linear) for linear in plan.linears if _is_learned(linear)}
    weights = sum(
        linear.shape[0] * linear.shape[1] * (expert_share if linear.role is Role.EXPERT else 1.0)
        for linear in plan.linears
        if layer_of_linear(linear) in learning
    )
    step = FORWARD_OVERHEAD * LEARNING_PRODUCTS * 2 * weights * min(BATCH, samples) * length
    return STEPS * step


def _is_learned(linear: LinearPlan) -> bool:
    return linear.scheme is not None and linear.role is not Role.EXPERT


def _passes(plan: QuantPlan, is_whole: bool) -> int:
    """Once at all, or to observe and to advance; where weights are corrected, both models, and group by group.

    Channels are scaled by what is seen in a pass of its own.

    Where one pass rounds all, once more through the codes that were learned and the KV cache that was chosen. Where
    codes learn, the original on the same inputs unless it runs alongside, and twice to measure; steps not counted.
    """
    corrects = "weight_correction" in plan.recipe.algorithms
    learning = (2 + (not corrects)) if learns(plan) else 0
    if not is_whole:  # 7: to the inputs of 4 groups, together 2.5 layers long, and to advance
        return (7 if corrects else 2) + learning + smooths(plan)
    has_linears = any(plan.schemes.values())
    again = (plan.calibrates_kv or learns(plan)) and has_linears
    return 1 + corrects + learning + again + smooths(plan)


def _inputs(plan: QuantPlan) -> list[list[LinearPlan]]:
    """Quantized linears by the input they share; an expert's gate and up."""
    inputs: dict[tuple[str, int], list[LinearPlan]] = defaultdict(list)
    for linear in plan.linears:
        if linear.scheme is not None:
            own = linear.name.rpartition(".")[0] if linear.role is Role.EXPERT else linear.group
            inputs[own, linear.shape[1]].append(linear)
    return list(inputs.values())


def _expert_share(checkpoint: Checkpoint) -> float:
    """Share of the experts that a token goes to."""
    config = checkpoint.text_config
    total = config.get("num_local_experts", config.get("num_experts"))
    return config["num_experts_per_tok"] / total if total else 1.0


def _gptq_seconds(plan: QuantPlan, device: torch.device) -> float:
    """Time of the columns, one after the other, of all linears: measured on some columns of each height."""
    columns: dict[int, int] = defaultdict(int)
    for linears in _inputs(plan):
        columns[sum(linear.shape[0] for linear in linears)] += linears[0].shape[1]
    return sum(
        count / SAMPLE_COLUMNS * _sample_seconds(num_rows, device) for num_rows, count in columns.items()
    )


def _awq_seconds(plan: QuantPlan, linears: list[LinearPlan], device: torch.device) -> float:
    """Time of rounding all linears of an input at each ratio: measured on some rows."""
    assert linears[0].scheme is not None, "only quantized linears are scaled"
    spec, num_inputs = linears[0].scheme.weight, linears[0].shape[1]
    generator = torch.Generator().manual_seed(0)
    w_NK = torch.randn(SAMPLE_ROWS, num_inputs, generator=generator).to(device)
    importance_K = torch.ones(num_inputs, device=device)
    seconds = _timed(
        lambda: rtn(w_NK, spec, plan.scale_dtype, scales="importance", importance_K=importance_K), device
    )
    return (NUM_RATIOS + 1) * seconds * sum(linear.shape[0] for linear in linears) / SAMPLE_ROWS


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


def _hidden_bytes(
    checkpoint: Checkpoint, plan: QuantPlan, tokens: CalibrationTokens, device: torch.device
) -> int:
    """Hidden states before and after a layer, of one model or of two; where codes learn, the outputs to learn from."""
    itemsize = compute_dtype(checkpoint, plan, device).itemsize
    corrects = "weight_correction" in plan.recipe.algorithms
    copies = 4 if corrects else 2 + learns(plan)
    return copies * tokens.ids_SL.numel() * _hidden_size(plan) * itemsize


def _hidden_size(plan: QuantPlan) -> int:
    return plan.linears[0].shape[1]


def _layer_bytes(checkpoint: Checkpoint, plan: QuantPlan) -> int:
    """The largest layer as it is on disk."""
    sizes: dict[int, int] = defaultdict(int)
    for linear in plan.linears:
        sizes[layer_of_linear(linear)] += checkpoint.info(f"{linear.name}.weight").num_bytes
    return max(sizes.values())


def _working_bytes(
    checkpoint: Checkpoint, plan: QuantPlan, tokens: CalibrationTokens, device: torch.device
) -> int:
    """Beside the hidden states, at the worst moment: outside tensors, a layer, its activations and statistics."""
    itemsize = compute_dtype(checkpoint, plan, device).itemsize
    found = layout(checkpoint, plan, tokens.ids_SL, device)
    in_layers = sum(checkpoint.info(f"{linear.name}.weight").num_bytes for linear in plan.linears)
    stored_itemsize = checkpoint.info(f"{plan.linears[0].name}.weight").dtype.itemsize
    scale = itemsize / stored_itemsize
    outside = (checkpoint.num_bytes - in_layers) * (1 + scale)
    layer = _layer_bytes(checkpoint, plan) * (1 + scale)
    statistics = _statistics_bytes(plan, found.is_whole and not learns(plan))
    working = outside + layer + found.batch * found.sample_bytes + statistics
    if learns(plan):
        learning = _learning_bytes(plan, min(BATCH, len(tokens.ids_SL)) * found.sample_bytes)
        working = max(working, outside + layer + statistics + learning)
    if "tune" in plan.recipe.algorithms:
        working = max(working, _tune_bytes(checkpoint, plan, tokens))
    if tokens.hash == NOT_WRITTEN:
        working = max(working, _writing_bytes(checkpoint, tokens, device))
    return int(working)


def _writing_bytes(checkpoint: Checkpoint, tokens: CalibrationTokens, device: torch.device) -> int:
    """The model, and keys, values and predictions of a batch of sequences."""
    samples, length = tokens.ids_SL.shape
    batch = batch_size(checkpoint, samples, length, device)
    dtype = text_dtype(checkpoint, device)
    weights = sum(math.prod(info.shape) for info in checkpoint.tensors.values())
    predictions = 16 * int(checkpoint.text_config["vocab_size"])
    return weights * dtype.itemsize + batch * (kv_token_bytes(checkpoint, device) * length + predictions)


def _statistics_bytes(plan: QuantPlan, is_whole: bool) -> int:
    """Second moments of one input or of all of a layer, and the factor of one, in float64."""
    matrices = 1 if "gptq" in plan.recipe.algorithms else 0
    matrices += "weight_correction" in plan.recipe.algorithms
    by_layer: dict[int, list[int]] = defaultdict(list)
    for linears in _inputs(plan):
        if linears[0].role is not Role.EXPERT:
            by_layer[layer_of_linear(linears[0])].append(4 * matrices * linears[0].shape[1] ** 2)
    largest = max((linears[0].shape[1] for linears in _inputs(plan)), default=0)
    at_once = max((max(sizes) if is_whole else sum(sizes) for sizes in by_layer.values()), default=0)
    return at_once + (24 * largest**2 if matrices else 0)


def _learning_bytes(plan: QuantPlan, batch_bytes: int) -> int:
    """What the largest layer learns with, and a batch's activations, kept for the way back."""
    weights: dict[int, int] = defaultdict(int)
    for linear in plan.linears:
        if _is_learned(linear):
            weights[layer_of_linear(linear)] += linear.shape[0] * linear.shape[1]
    return LEARNING_BYTES * max(weights.values(), default=0) + 2 * batch_bytes


def _tune_bytes(checkpoint: Checkpoint, plan: QuantPlan, tokens: CalibrationTokens) -> int:
    """The original and the quantized model in float32, and 16 bytes for each weight that learns; logits of a batch."""
    weights = sum(linear.shape[0] * linear.shape[1] for linear in plan.linears)
    all_weights = checkpoint.num_bytes // checkpoint.info(f"{plan.linears[0].name}.weight").dtype.itemsize
    batch = min(plan.recipe.tune.batch, len(tokens.ids_SL))
    vocabulary = int(checkpoint.text_config["vocab_size"])
    logits = 6 * 4 * batch * tokens.ids_SL.shape[1] * vocabulary
    return 4 * all_weights + (24 if plan.recipe.tune.codes else 8) * weights + logits
