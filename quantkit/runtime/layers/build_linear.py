"""From linears as stored to the modules that compute them on a target."""

from collections.abc import Sequence

from torch import Tensor

from quantkit.runtime.layers.gpu_linear import GpuLinear
from quantkit.runtime.layers.linear import InFixedRows, Linear, QuantLinear, SideBySide
from quantkit.runtime.layers.linear_part import LinearPart, join
from quantkit.runtime.layers.rows import AnyLinear
from quantkit.runtime.target import Target


def build_linear(parts: Sequence[LinearPart], target: Target) -> AnyLinear:
    """Linears of one input as one: y has their outputs next to each other, in the order given.

    One product where their formats allow, else several. Raises SchemeError where the device has no kernel for one.
    """
    linears = [_build(part, target) for part in join(parts)]
    return linears[0] if len(linears) == 1 else SideBySide(linears)


def _build(part: LinearPart, target: Target) -> AnyLinear:
    if target.has_kernels:
        return GpuLinear(part, target)
    linear: AnyLinear = (
        Linear(part.weight, part.bias_N)
        if isinstance(part.weight, Tensor)
        else QuantLinear(part, dtype=target.dtype)
    )
    return InFixedRows(linear) if target.batch_invariant else linear
