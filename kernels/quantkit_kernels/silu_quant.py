"""act(gate) · up, and the codes that the down projection reads, in one pass.

    gate_up [T, 2F]   | gate: F columns | up: F columns |   ->   [T, F]   or   codes [T, F], scale [T, G]

act is SiLU or GELU in its tanh form. Both roundings are those of the models: act(gate) to the dtype of gate_up, then
the product. With one dynamic scale per token a program holds a whole row, for the largest |value| has to be known
before the first code is; everything else goes by PART columns.

Bound: bytes. bf16 to 8-bit codes: 2 + 2 read, 1 written per element.
Shape suffixes: T tokens, F intermediate features, G groups of features that share a scale.
"""

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantkit_kernels.capability import converts_float8, starts_early
from quantkit_kernels.row_codes import (
    HALF_RANGE,
    MAX_FEATURES,
    check_codes,
    empty_codes,
    encode_rows,
    rounded,
    store_codes,
    warps_for,
)

Activation = Literal["silu", "gelu_tanh"]
PART, PART_WARPS = 2048, 4
ROW_ELEMENTS_OF_A_WARP = 1024


@triton.jit
def activated(x, IS_SILU: tl.constexpr):
    """SiLU, or GELU with tanh: both are x · sigmoid(…), as ½ (1 + tanh u) = sigmoid(2u)."""
    argument = x if IS_SILU else 1.5957691216057308 * (x + 0.044715 * x * x * x)  # 2 · √(2 / π)
    return x / (1.0 + tl.exp(-argument))


@triton.jit
def activation_kernel(
    gate_up, product, codes, scales, static_scale, zero_point, stride_gate_up, stride_scale,
    NUM_FEATURES: tl.constexpr, IS_SILU: tl.constexpr, GROUP: tl.constexpr, HALF_RANGE: tl.constexpr,
    IS_FLOAT8: tl.constexpr, HAS_FLOAT8: tl.constexpr, EARLY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program: BLOCK columns of one row. product, or codes and scales: the others are None."""
    DTYPE: tl.constexpr = gate_up.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    column = first + tl.arange(0, BLOCK)
    is_there = column < NUM_FEATURES
    gate_up += token * stride_gate_up
    if EARLY:
        gdc_wait()
    gate_F = tl.load(gate_up + column, mask=is_there, other=0.0).to(tl.float32)
    up_F = tl.load(gate_up + NUM_FEATURES + column, mask=is_there, other=0.0).to(tl.float32)
    if EARLY:
        gdc_launch_dependents()
    value_F = rounded(rounded(activated(gate_F, IS_SILU), DTYPE) * up_F, DTYPE)
    if product is not None:
        tl.store(product + token * NUM_FEATURES + column, value_F.to(DTYPE), mask=is_there)
    else:
        store_codes(
            value_F, codes + token * NUM_FEATURES, scales + token * stride_scale, static_scale, zero_point, column,
            first // GROUP if GROUP else 0, NUM_FEATURES, GROUP, HALF_RANGE, IS_FLOAT8, HAS_FLOAT8, DTYPE,
        )  # fmt: skip


@torch.library.custom_op("quantkit::gated_activation", mutates_args=(), device_types="cuda")
def gated_activation(gate_up_TF: Tensor, activation: str) -> Tensor:
    """act(gate) · up, [T, F] in the dtype of gate_up [T, 2F]; features contiguous. activation: silu or gelu_tanh."""
    return launch_product(gate_up_TF, activation)


@gated_activation.register_fake
def _(gate_up_TF: Tensor, activation: str) -> Tensor:
    return gate_up_TF.new_empty(gate_up_TF.shape[0], gate_up_TF.shape[1] // 2)


@gated_activation.register_kernel("cpu")
def activate(gate_up_TF: Tensor, activation: str) -> Tensor:
    """`gated_activation` in plain torch."""
    _check(gate_up_TF, activation)
    gate_TF, up_TF = gate_up_TF.chunk(2, dim=1)
    if activation == "silu":
        return functional.silu(gate_TF) * up_TF
    return functional.gelu(gate_TF, approximate="tanh") * up_TF


@torch.library.custom_op("quantkit::gated_activation_codes", mutates_args=(), device_types="cuda")
def gated_activation_codes(
    gate_up_TF: Tensor,
    activation: str,
    code_dtype: torch.dtype,
    group: int,
    static_scale: Tensor | None,
    zero_point: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`gated_activation`, then `quantize_rows` of it: codes [T, F] and their scale, float32 [T, G]."""
    return launch_codes(gate_up_TF, activation, code_dtype, group, static_scale, zero_point)


@gated_activation_codes.register_fake
def _(
    gate_up_TF: Tensor,
    activation: str,
    code_dtype: torch.dtype,
    group: int,
    static_scale: Tensor | None,
    zero_point: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return empty_codes(gate_up_TF, gate_up_TF.shape[1] // 2, code_dtype, group)


@gated_activation_codes.register_kernel("cpu")
def _(
    gate_up_TF: Tensor,
    activation: str,
    code_dtype: torch.dtype,
    group: int,
    static_scale: Tensor | None,
    zero_point: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return encode_rows(activate(gate_up_TF, activation), code_dtype, group, static_scale, zero_point)


def launch_product(
    gate_up_TF: Tensor, activation: str, *, part: int = PART, num_warps: int = PART_WARPS
) -> Tensor:
    """`gated_activation` without the operator around it."""
    _check(gate_up_TF, activation)
    num_tokens, num_features = gate_up_TF.shape[0], gate_up_TF.shape[1] // 2
    product_TF = gate_up_TF.new_empty(num_tokens, num_features)
    early = starts_early(gate_up_TF.device)
    if num_tokens > 0:
        activation_kernel[(num_tokens, triton.cdiv(num_features, part))](
            gate_up_TF, product_TF, None, None, None, None, gate_up_TF.stride(0), 0,
            num_features, activation == "silu", 0, 1.0, False, False, early, part,
            num_warps=num_warps, launch_pdl=early,
        )  # fmt: skip
    return product_TF


def launch_codes(
    gate_up_TF: Tensor,
    activation: str,
    code_dtype: torch.dtype,
    group: int,
    static_scale: Tensor | None,
    zero_point: Tensor | None,
    *,
    num_warps: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`gated_activation_codes` without the operator around it."""
    _check(gate_up_TF, activation)
    num_tokens, num_features = gate_up_TF.shape[0], gate_up_TF.shape[1] // 2
    check_codes(num_features, code_dtype, group, static_scale, zero_point)
    codes, scale = empty_codes(gate_up_TF, num_features, code_dtype, group)
    is_whole_row = static_scale is None and group == 0
    block = triton.next_power_of_2(num_features) if is_whole_row else max(PART, group)
    warps = num_warps or (warps_for(block, ROW_ELEMENTS_OF_A_WARP) if is_whole_row else PART_WARPS)
    early = starts_early(gate_up_TF.device)
    if num_tokens > 0:
        activation_kernel[(num_tokens, triton.cdiv(num_features, block))](
            gate_up_TF, None, codes.view(torch.int8), scale, static_scale, zero_point, gate_up_TF.stride(0),
            scale.stride(0), num_features, activation == "silu", group, HALF_RANGE[code_dtype],
            code_dtype == torch.float8_e4m3fn, converts_float8(gate_up_TF.device), early, block,
            num_warps=warps, launch_pdl=early,
        )  # fmt: skip
    return codes, scale


def _check(gate_up_TF: Tensor, activation: str) -> None:
    assert activation in ("silu", "gelu_tanh"), f"activation {activation!r}"
    assert gate_up_TF.ndim == 2 and gate_up_TF.stride(1) == 1 and gate_up_TF.shape[1] % 2 == 0, (
        f"gate and up side by side, not {gate_up_TF.shape} by {gate_up_TF.stride()}"
    )
    assert gate_up_TF.shape[1] // 2 <= MAX_FEATURES, f"{gate_up_TF.shape[1] // 2} features"
