"""act(gate) · up, and the codes that the down projection reads, as one operator.

    gate_up [T, 2F]   | gate: F columns | up: F columns |   ->   [T, F]   or   codes [T, F], scale [T, G]

act is SiLU or GELU in its tanh form. Both roundings are those of the models: act(gate) to the dtype of gate_up, then
the product. Codes are those of `row_codes` of what `gated_activation` returns, bit by bit.

Shape suffixes: T tokens, F intermediate features, G groups of features that share a scale.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from quantkit_kernels.operators import operator
from quantkit_kernels.row_codes import MAX_FEATURES, Codes, encode_rows


def activate(gate_up_TF: Tensor, activation: str) -> Tensor:
    """`gated_activation` in plain torch."""
    check(gate_up_TF, activation)
    gate_TF, up_TF = gate_up_TF.chunk(2, dim=1)
    if activation == "silu":
        return functional.silu(gate_TF) * up_TF
    return functional.gelu(gate_TF, approximate="tanh") * up_TF


def check(gate_up_TF: Tensor, activation: str) -> None:
    """What `gated_activation` says about its operands."""
    assert activation in ("silu", "gelu_tanh"), f"activation {activation!r}"
    assert gate_up_TF.ndim == 2 and gate_up_TF.stride(1) == 1 and gate_up_TF.shape[1] % 2 == 0, (
        f"gate and up side by side, not {gate_up_TF.shape} by {gate_up_TF.stride()}"
    )
    assert gate_up_TF.shape[1] // 2 <= MAX_FEATURES, f"{gate_up_TF.shape[1] // 2} features"


def _fake(gate_up_TF: Tensor, activation: str) -> Tensor:
    return gate_up_TF.new_empty(gate_up_TF.shape[0], gate_up_TF.shape[1] // 2)


@operator("gated_activation", cpu=activate, fake=_fake)
def gated_activation(gate_up_TF: Tensor, activation: str) -> Tensor:
    """act(gate) · up, [T, F] in the dtype of gate_up [T, 2F]; features contiguous. activation: silu or gelu_tanh."""
    from quantkit_kernels import silu_kernel

    return silu_kernel.launch(gate_up_TF, activation)


def _activate_codes(gate_up_TF: Tensor, activation: str, *codes: Any) -> tuple[Tensor, Tensor]:
    return encode_rows(activate(gate_up_TF, activation), Codes(*codes))


def _fake_codes(
    gate_up_TF: Tensor, activation: str, code_dtype: torch.dtype, group: int, *_: object
) -> tuple[Tensor, Tensor]:
    return Codes(code_dtype, group).empty(gate_up_TF, gate_up_TF.shape[1] // 2)


@operator("gated_activation_codes", cpu=_activate_codes, fake=_fake_codes)
def gated_activation_codes(
    gate_up_TF: Tensor,
    activation: str,
    code_dtype: torch.dtype,
    group: int,
    static_scale: Tensor | None,
    zero_point: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`gated_activation`, then `quantize_rows` of it: codes [T, F] and their scale, float32 [T, G]."""
    from quantkit_kernels import silu_kernel

    return silu_kernel.launch_codes(
        gate_up_TF, activation, Codes(code_dtype, group, static_scale, zero_point)
    )
