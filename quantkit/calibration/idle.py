"""Algorithms of a plan that find nothing, or less than their name says, to change in this model."""

from collections.abc import Iterator

from quantkit.arch import Role
from quantkit.arch.pairs import layer_wiring, read_heads
from quantkit.calibration.folds import why_stream_stays
from quantkit.calibration.smoothing import is_scaled, smooths
from quantkit.formats.checkpoint import Checkpoint
from quantkit.recipe import LinearPlan, QuantPlan


def idle_algorithms(checkpoint: Checkpoint, plan: QuantPlan) -> Iterator[str]:
    """A line for each, from names and shapes alone; the family of the checkpoint is known."""
    algorithms = plan.recipe.algorithms
    dense = [one for one in plan.quantized if one.role is not Role.EXPERT]
    if "rotate" in algorithms:
        reason = why_stream_stays(checkpoint)
        if reason is not None:
            yield f"rotate leaves the residual stream as it is: {reason}"
    if smooths(plan) and not _can_scale(checkpoint, dense):
        name = "awq" if "awq" in algorithms else "smoothquant"
        yield f"{name} changes nothing here: no scale can be folded in front of what is quantized"
    if "weight_correction" in algorithms and not dense:
        yield "weight_correction changes nothing here: it leaves experts as they are"
    if "bias_correction" in algorithms and not any(f"{one.name}.bias" in checkpoint.tensors for one in dense):
        yield "bias_correction changes nothing here: no quantized linear has a bias"


def _can_scale(checkpoint: Checkpoint, dense: list[LinearPlan]) -> bool:
    heads = read_heads(checkpoint)
    names = {linear.name for linear in dense}
    for layer in sorted({linear.layer for linear in dense}):
        wiring = layer_wiring(checkpoint, layer)
        below = {name.removeprefix(wiring.prefix) for name in names if name.startswith(wiring.prefix)}
        if any(is_scaled(pair, heads, below) for pair in wiring.pairs):
            return True
    return False
