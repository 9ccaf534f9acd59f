"""Residual add, RMS norm, and the codes that the next linear reads, in one pass over each token.

    x [T, E] ─┐                    ┌─► residual [T, E]     the sum, rounded, where the residual was
              + ─► h ─► h / rms(h) ┤
    residual ─┘                    └─► · weight ─► normed [T, E]   or   codes [T, E], scale [T, G]

A program holds one token: its row is read once, stays in registers for both reductions (Σ h² and largest |value|), and
is written once. The sum goes where the residual was: nobody reads the old one again, so a second buffer would only
take more of the L2.

Roundings are those of the models: the sum to the dtype of x; then weight · round(ĥ), or, with `plus_one` (Gemma),
round(ĥ · (1 + weight)). Codes are those of `row_codes` of what `rms_norm` returns, bit by bit.

Bound: bytes. bf16 with residual to 8-bit codes: 2 + 2 + 2 + 1 per element.
Shape suffixes: T tokens, E features, G groups of features that share a scale.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantkit_kernels.capability import converts_float8, starts_early
from quantkit_kernels.row_codes import (
    HALF_RANGE,
    check_codes,
    check_rows,
    empty_codes,
    encode_rows,
    rounded,
    store_codes,
    warps_for,
)


@triton.jit
def norm_kernel(
    x, residual, weight, normed, codes, scales, static_scale, zero_point, stride_x, stride_residual, stride_scale, eps,
    NUM_FEATURES: tl.constexpr, PLUS_ONE: tl.constexpr, GROUP: tl.constexpr, HALF_RANGE: tl.constexpr,
    IS_FLOAT8: tl.constexpr, HAS_FLOAT8: tl.constexpr, EARLY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program: one row of x. residual: read and written, or None. normed, or codes and scales: the others are None."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    is_there = column < NUM_FEATURES
    weight_E = tl.load(weight + column, mask=is_there, other=0.0).to(tl.float32)
    if EARLY:
        gdc_wait()
    x_E = tl.load(x + token * stride_x + column, mask=is_there, other=0.0).to(tl.float32)
    if residual is not None:
        at = residual + token * stride_residual + column
        x_E = rounded(x_E + tl.load(at, mask=is_there, other=0.0).to(tl.float32), DTYPE)
        tl.store(at, x_E.to(DTYPE), mask=is_there)
    if EARLY:
        gdc_launch_dependents()
    x_E *= tl.math.rsqrt(tl.sum(x_E * x_E, axis=0) / NUM_FEATURES + eps)
    if PLUS_ONE:
        x_E = rounded(x_E * (1.0 + weight_E), DTYPE)
    else:
        x_E = rounded(weight_E * rounded(x_E, DTYPE), DTYPE)
    if normed is not None:
        tl.store(normed + token * NUM_FEATURES + column, x_E.to(DTYPE), mask=is_there)
    else:
        store_codes(
            x_E, codes + token * NUM_FEATURES, scales + token * stride_scale, static_scale, zero_point, column, 0,
            NUM_FEATURES, GROUP, HALF_RANGE, IS_FLOAT8, HAS_FLOAT8, DTYPE,
        )  # fmt: skip


@torch.library.custom_op("quantkit::rms_norm", mutates_args=("residual_TE",), device_types="cuda")
def rms_norm(
    x_TE: Tensor, residual_TE: Tensor | None, weight_E: Tensor, eps: float, plus_one: bool
) -> Tensor:
    """Norm of x, or of x + residual, [T, E] in the dtype of x; the residual becomes the sum.

    All of one float dtype, features contiguous. plus_one: the stored weight is around 0 (Gemma).
    """
    return launch_norm(x_TE, residual_TE, weight_E, eps, plus_one)


@rms_norm.register_fake
def _(x_TE: Tensor, residual_TE: Tensor | None, weight_E: Tensor, eps: float, plus_one: bool) -> Tensor:
    return x_TE.new_empty(x_TE.shape)


@rms_norm.register_kernel("cpu")
def norm_rows(
    x_TE: Tensor, residual_TE: Tensor | None, weight_E: Tensor, eps: float, plus_one: bool
) -> Tensor:
    """`rms_norm` in plain torch."""
    _check(x_TE, residual_TE, weight_E)
    if residual_TE is not None:
        x_TE = residual_TE.add_(x_TE)
    wide_TE = x_TE.float()
    normed_TE = wide_TE * torch.rsqrt(wide_TE.square().mean(dim=-1, keepdim=True) + eps)
    if plus_one:
        return (normed_TE * (1.0 + weight_E.float())).to(x_TE.dtype)
    return weight_E * normed_TE.to(x_TE.dtype)


@torch.library.custom_op("quantkit::rms_norm_codes", mutates_args=("residual_TE",), device_types="cuda")
def rms_norm_codes(
    x_TE: Tensor,
    residual_TE: Tensor | None,
    weight_E: Tensor,
    eps: float,
    plus_one: bool,
    code_dtype: torch.dtype,
    group: int,
    static_scale: Tensor | None,
    zero_point: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`rms_norm`, then `quantize_rows` of it: codes [T, E] and their scale, float32 [T, G]."""
    return launch_norm_codes(
        x_TE, residual_TE, weight_E, eps, plus_one, code_dtype, group, static_scale, zero_point
    )


@rms_norm_codes.register_fake
def _(
    x_TE: Tensor,
    residual_TE: Tensor | None,
    weight_E: Tensor,
    eps: float,
    plus_one: bool,
    code_dtype: torch.dtype,
    group: int,
    static_scale: Tensor | None,
    zero_point: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return empty_codes(x_TE, x_TE.shape[1], code_dtype, group)


@rms_norm_codes.register_kernel("cpu")
def _(
    x_TE: Tensor,
    residual_TE: Tensor | None,
    weight_E: Tensor,
    eps: float,
    plus_one: bool,
    code_dtype: torch.dtype,
    group: int,
    static_scale: Tensor | None,
    zero_point: Tensor | None,
) -> tuple[Tensor, Tensor]:
    normed_TE = norm_rows(x_TE, residual_TE, weight_E, eps, plus_one)
    return encode_rows(normed_TE, code_dtype, group, static_scale, zero_point)


def launch_norm(
    x_TE: Tensor,
    residual_TE: Tensor | None,
    weight_E: Tensor,
    eps: float,
    plus_one: bool,
    *,
    num_warps: int | None = None,
) -> Tensor:
    """`rms_norm` without the operator around it."""
    _check(x_TE, residual_TE, weight_E)
    normed_TE = x_TE.new_empty(x_TE.shape)
    _run(x_TE, residual_TE, weight_E, eps, plus_one, normed_TE, None, None, None, None, 0, num_warps)
    return normed_TE


def launch_norm_codes(
    x_TE: Tensor,
    residual_TE: Tensor | None,
    weight_E: Tensor,
    eps: float,
    plus_one: bool,
    code_dtype: torch.dtype,
    group: int,
    static_scale: Tensor | None,
    zero_point: Tensor | None,
    *,
    num_warps: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`rms_norm_codes` without the operator around it."""
    _check(x_TE, residual_TE, weight_E)
    check_codes(x_TE.shape[1], code_dtype, group, static_scale, zero_point)
    codes, scale = empty_codes(x_TE, x_TE.shape[1], code_dtype, group)
    _run(
        x_TE, residual_TE, weight_E, eps, plus_one, None, codes, scale, static_scale, zero_point, group, num_warps
    )  # fmt: skip
    return codes, scale


def _run(
    x_TE: Tensor,
    residual_TE: Tensor | None,
    weight_E: Tensor,
    eps: float,
    plus_one: bool,
    normed_TE: Tensor | None,
    codes_TE: Tensor | None,
    scale_TG: Tensor | None,
    static_scale: Tensor | None,
    zero_point: Tensor | None,
    group: int,
    num_warps: int | None,
) -> None:
    num_tokens, num_features = x_TE.shape
    block = triton.next_power_of_2(num_features)
    early = starts_early(x_TE.device)
    code_dtype = torch.int8 if codes_TE is None else codes_TE.dtype
    if num_tokens == 0:
        return
    norm_kernel[(num_tokens,)](
        x_TE, residual_TE, weight_E, normed_TE, None if codes_TE is None else codes_TE.view(torch.int8), scale_TG,
        static_scale, zero_point, x_TE.stride(0), 0 if residual_TE is None else residual_TE.stride(0),
        0 if scale_TG is None else scale_TG.stride(0), eps, num_features, plus_one, group, HALF_RANGE[code_dtype],
        code_dtype == torch.float8_e4m3fn, converts_float8(x_TE.device), early, block,
        num_warps=num_warps or warps_for(block), launch_pdl=early,
    )  # fmt: skip


def _check(x_TE: Tensor, residual_TE: Tensor | None, weight_E: Tensor) -> None:
    check_rows(x_TE)
    assert weight_E.shape == x_TE.shape[1:] and weight_E.is_contiguous(), f"weight {weight_E.shape}"
    assert weight_E.dtype == x_TE.dtype, f"weight of {weight_E.dtype} for {x_TE.dtype}"
    if residual_TE is not None:
        check_rows(residual_TE)
        assert residual_TE.shape == x_TE.shape and residual_TE.dtype == x_TE.dtype, (
            f"residual {residual_TE.shape} of {residual_TE.dtype}"
        )
