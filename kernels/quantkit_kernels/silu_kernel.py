"""`silu_quant` on a GPU, in one pass.

With one dynamic scale per token the largest |value| of a row has to be known before the first code is. A program holds
a whole row; or, for few tokens and wide rows, the product goes by parts like everything else, each of which leaves its
largest |value|, and a second kernel makes the codes. One program takes as long for exponentials and quotients of 14336
columns as all multiprocessors for a row each (one token on an H100: 3.2 us, in parts of 512 columns 2.1).

Bound: bytes. bf16 to 8-bit codes: 2 + 2 read, 1 written per element.
Shape suffixes: T tokens, F intermediate features, G groups of features that share a scale.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantkit_kernels.capability import starts_early
from quantkit_kernels.row_codes import Codes
from quantkit_kernels.row_codes_kernel import (
    amax_of,
    as_bytes,
    code_of,
    constants,
    rounded,
    scale_of,
    scaled_by,
    store_codes,
    warps_for,
)
from quantkit_kernels.silu_quant import check
from quantkit_kernels.triton_launch import Launcher, num_parts, power_above

PART, PART_WARPS = 2048, 8
FEW_TOKENS, FEW_WIDTH = 32, 8192  # rows in parts: so many, if they are wider
FEW_PART, FEW_WARPS = 512, 4


@triton.jit
def activated(x, IS_SILU: tl.constexpr):
    """SiLU, or GELU with tanh: both are x · sigmoid(…), as ½ (1 + tanh u) = sigmoid(2u)."""
    argument = x if IS_SILU else 1.5957691216057308 * (x + 0.044715 * x * x * x)  # 2 · √(2 / π)
    return x / (1.0 + tl.exp(-argument))


@triton.jit
def activation_kernel(
    gate_up, product, part_amax, codes, scales, static_scale, zero_point, stride_gate_up, stride_scale,
    NUM_FEATURES: tl.constexpr, IS_SILU: tl.constexpr, GROUP: tl.constexpr, HALF_RANGE: tl.constexpr,
    IS_FLOAT8: tl.constexpr, HAS_FLOAT8: tl.constexpr, EARLY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program: BLOCK columns of one row. product and part_amax, or codes and scales: the others are None.

    part_amax: float32 [T, programs of a row], or None.
    """
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
        if part_amax is not None:
            tl.store(part_amax + token * tl.num_programs(1) + tl.program_id(1), amax_of(value_F, 0))
    else:
        store_codes(
            value_F, codes + token * NUM_FEATURES, scales + token * stride_scale, static_scale, zero_point, column,
            first // GROUP if GROUP else 0, NUM_FEATURES, GROUP, HALF_RANGE, IS_FLOAT8, HAS_FLOAT8, DTYPE,
        )  # fmt: skip


@triton.jit
def encode_parts_kernel(
    x, part_amax, codes, scales, NUM_FEATURES: tl.constexpr, NUM_PARTS: tl.constexpr, PARTS: tl.constexpr,
    HALF_RANGE: tl.constexpr, IS_FLOAT8: tl.constexpr, HAS_FLOAT8: tl.constexpr, EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A program: BLOCK columns of one row of x, contiguous. PARTS: a power of two, of which NUM_PARTS are there."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    part = tl.arange(0, PARTS)
    at = token * NUM_FEATURES + column
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    amax_P = tl.load(part_amax + token * NUM_PARTS + part, mask=part < NUM_PARTS, other=0.0)
    x_K = tl.load(x + at, mask=column < NUM_FEATURES, other=0.0).to(tl.float32)
    scale = scale_of(amax_of(amax_P, 0), HALF_RANGE, DTYPE)
    if tl.program_id(1) == 0:
        tl.store(scales + token, scale)
    code_K = code_of(scaled_by(x_K, scale, DTYPE), None, IS_FLOAT8, HAS_FLOAT8, DTYPE)
    tl.store(codes + at, code_K, mask=column < NUM_FEATURES)


_activation = Launcher(activation_kernel)
_encode_parts = Launcher(encode_parts_kernel)


def launch(gate_up_TF: Tensor, activation: str, *, part: int = PART, num_warps: int = PART_WARPS) -> Tensor:
    """`gated_activation` without the operator around it."""
    check(gate_up_TF, activation)
    num_tokens, num_features = gate_up_TF.shape[0], gate_up_TF.shape[1] // 2
    product_TF = gate_up_TF.new_empty(num_tokens, num_features)
    early = starts_early(gate_up_TF.device)
    if num_tokens > 0:
        _activation(
            (num_tokens, num_parts(num_features, part)),
            (gate_up_TF, product_TF, None, None, None, None, None, gate_up_TF.stride(0), 0),
            (num_features, activation == "silu", 0, 1.0, False, False, early, part),
            num_warps=num_warps,
            early=early,
        )
    return product_TF


def launch_codes(
    gate_up_TF: Tensor,
    activation: str,
    codes: Codes,
    *,
    num_warps: int | None = None,
    few_tokens: int = FEW_TOKENS,
) -> tuple[Tensor, Tensor]:
    """`gated_activation_codes` without the operator around it."""
    check(gate_up_TF, activation)
    num_tokens, num_features = gate_up_TF.shape[0], gate_up_TF.shape[1] // 2
    codes.check(num_features)
    codes_TF, scale_TG = codes.empty(gate_up_TF, num_features)
    block, warps = max(PART, codes.group), PART_WARPS
    if codes.static_scale is None and codes.group == 0:
        if 0 < num_tokens <= few_tokens and num_features > FEW_WIDTH:
            _launch_in_parts(gate_up_TF, activation, codes, codes_TF, scale_TG)
            return codes_TF, scale_TG
        block = power_above(num_features)
        warps = warps_for(block)
    early = starts_early(gate_up_TF.device)
    if num_tokens > 0:
        results = (None, None, as_bytes(codes_TF), scale_TG, codes.static_scale, codes.zero_point)
        _activation(
            (num_tokens, num_parts(num_features, block)),
            (gate_up_TF, *results, gate_up_TF.stride(0), scale_TG.stride(0)),
            (num_features, activation == "silu", *constants(codes, gate_up_TF.device), early, block),
            num_warps=num_warps or warps,
            early=early,
        )
    return codes_TF, scale_TG


def _launch_in_parts(
    gate_up_TF: Tensor, activation: str, codes: Codes, codes_TF: Tensor, scale_TG: Tensor
) -> None:
    """The same codes, by parts of rows in two launches."""
    num_tokens, num_features = codes_TF.shape
    parts = num_parts(num_features, FEW_PART)
    product_TF = gate_up_TF.new_empty(num_tokens, num_features)
    part_amax = gate_up_TF.new_empty(num_tokens, parts, dtype=torch.float32)
    _, half_range, is_float8, has_float8 = constants(codes, gate_up_TF.device)
    early = starts_early(gate_up_TF.device)
    _activation(
        (num_tokens, parts),
        (gate_up_TF, product_TF, part_amax, None, None, None, None, gate_up_TF.stride(0), 0),
        (num_features, activation == "silu", 0, 1.0, False, False, early, FEW_PART),
        num_warps=FEW_WARPS,
        early=early,
    )
    _encode_parts(
        (num_tokens, parts),
        (product_TF, part_amax, as_bytes(codes_TF), scale_TG),
        (num_features, parts, power_above(parts), half_range, is_float8, has_float8, early, FEW_PART),
        num_warps=FEW_WARPS,
        early=early,
    )
