"""From experts as stored to the module that computes them on a target."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from quantkit.errors import SchemeError
from quantkit.runtime.layers.build_linear import build_linear
from quantkit.runtime.layers.gpu_linear import activation_on
from quantkit.runtime.layers.linear_part import LinearPart, join
from quantkit.runtime.layers.mlp import Activation, GatedMLP
from quantkit.runtime.layers.moe import ExpertByExpert, GroupedExperts
from quantkit.runtime.target import Target
from quantkit.schemes import FloatSpec, IntSpec, PerBlock, PerChannel, PerGroup, PerTensor, PerToken, Scheme
from quantkit.schemes.labels import scheme_label
from quantkit_kernels import moe
from quantkit_kernels.capability import converts_float8
from quantkit_kernels.moe import BLOCK, ExpertWeight
from quantkit_kernels.operands import GROUPS
from quantkit_kernels.row_codes import Codes
from quantkit_kernels.weight import LinearWeight


def build_experts(
    gate_up: Iterable[Sequence[LinearPart]],
    down: Iterable[LinearPart],
    num_experts: int,
    scheme: Scheme | None,
    activation: Activation,
    target: Target,
) -> ExpertByExpert | GroupedExperts:
    """gate_up: gate and up of each expert, down: its third linear; both are taken one expert after another.

    scheme: of them all. Raises SchemeError where a GPU has no grouped product for it, or an expert has another.
    """
    if target.has_kernels:
        return group_experts(gate_up, down, num_experts, scheme, activation, target)
    return ExpertByExpert(
        GatedMLP(build_linear(pair, target), build_linear([last], target), activation)
        for pair, last in zip(gate_up, down, strict=True)
    )


def group_experts(
    gate_up: Iterable[Sequence[LinearPart]],
    down: Iterable[LinearPart],
    num_experts: int,
    scheme: Scheme | None,
    activation: Activation,
    target: Target,
) -> GroupedExperts:
    """`build_experts` on a GPU."""
    return GroupedExperts(
        _stacked((_one(join(pair), scheme, target) for pair in gate_up), num_experts, scheme),
        _stacked((_one([last], scheme, target) for last in down), num_experts, scheme),
        activation,
        input_codes=_input_codes(scheme, target),
        batch_invariant=target.batch_invariant,
    )


def check_experts(name: str, scheme: Scheme | None, target: Target) -> None:
    """Raise SchemeError, naming an expert's linear, scheme, device and what comes nearest, if no kernel groups it."""
    has_fp8 = converts_float8(target.device)
    if scheme is None or (_takes_weight(scheme, has_fp8=has_fp8) and _takes_input(scheme)):
        return
    device = torch.cuda.get_device_name(target.device)
    raise SchemeError(
        f"{name} in {scheme_label(scheme)} on {device}: no kernel multiplies experts in this format",
        fix=f"run it on the CPU, or quantize its experts to {_nearest(scheme, has_fp8=has_fp8)}",
    )


def _takes_weight(scheme: Scheme, *, has_fp8: bool) -> bool:
    match scheme.weight:
        case IntSpec(bits=4, granularity=PerGroup(size)):
            return size in GROUPS
        case IntSpec(bits=4, granularity=PerChannel() | PerTensor()):
            return True
        case FloatSpec(granularity=PerChannel() | PerTensor()):
            return has_fp8
        case FloatSpec(granularity=PerBlock(rows, cols)):
            return has_fp8 and rows == cols == BLOCK
    return False


def _takes_input(scheme: Scheme) -> bool:
    """FP8 weights with FP8 inputs, whose dynamic scales are per token, or per 128 columns where weights have blocks."""
    in_blocks = isinstance(scheme.weight.granularity, PerBlock)
    match scheme.activation:
        case None:
            return True
        case FloatSpec(granularity=PerToken()):
            return isinstance(scheme.weight, FloatSpec) and not in_blocks
        case FloatSpec(granularity=PerGroup(size)):
            return in_blocks and size == BLOCK
    return False


def _nearest(scheme: Scheme, *, has_fp8: bool) -> str:
    if not has_fp8 or (isinstance(scheme.weight, IntSpec) and scheme.weight.bits <= 4):
        return "INT4 in groups of 32, 64 or 128 with 16-bit inputs"
    return "FP8, with 16-bit inputs or FP8 ones with dynamic scales"


def _one(parts: Sequence[LinearPart], scheme: Scheme | None, target: Target) -> LinearWeight | Tensor:
    """The weight of the one linear of `parts`, in the scheme of the layer's experts."""
    if len(parts) > 1 or parts[0].scheme != scheme:
        raise SchemeError(
            f"{parts[-1].name} is in another format than the rest of its layer's experts, or its blocks are cut off",
            fix="run it on the CPU, or quantize all experts alike",
        )
    check_experts(parts[0].name, scheme, target)
    return parts[0].weight


def _stacked(
    weights: Iterable[LinearWeight | Tensor], num_experts: int, scheme: Scheme | None
) -> ExpertWeight:
    if scheme is None:
        return moe.prepare_dense((w for w in weights if isinstance(w, Tensor)), num_experts)
    return moe.prepare((w for w in weights if not isinstance(w, Tensor)), num_experts)


def _input_codes(scheme: Scheme | None, target: Target) -> Codes | None:
    spec = None if scheme is None else activation_on(scheme, target.device)
    if spec is None:
        return None
    group = spec.granularity.size if isinstance(spec.granularity, PerGroup) else 0
    return Codes(torch.float8_e4m3fn, group)
