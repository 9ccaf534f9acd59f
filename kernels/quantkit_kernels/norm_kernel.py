"""`norm_quant` on a GPU: a program holds one token.

Its row is read once, stays in registers for both reductions (Σ h² and largest |value|), and is written once. The
weight does not depend on the kernel before, so it is read while that one ends.

Bound: bytes. bf16 with residual to 8-bit codes: 2 + 2 + 2 + 1 per element.
Shape suffixes: T tokens, E features, G groups of features that share a scale.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantkit_kernels.capability import starts_early
from quantkit_kernels.norm_quant import Norm, check
from quantkit_kernels.row_codes import Codes
from quantkit_kernels.row_codes_kernel import as_bytes, constants, rounded, store_codes, warps_for
from quantkit_kernels.triton_launch import Launcher, power_above


@triton.jit
def normed_row(
    x_E, weight_E, eps, NUM_FEATURES: tl.constexpr, PLUS_ONE: tl.constexpr, IS_ADDED: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """x / rms(x) · weight, or · (1 + weight), in float32 with the models' roundings.

    IS_ADDED: something is added to it next. The compiler would make product and sum one instruction, which leaves out
    the rounding between them; a product that is one already, with 0, it leaves alone.
    """
    x_E *= tl.math.rsqrt(tl.sum(x_E * x_E, axis=0) / NUM_FEATURES + eps)
    if PLUS_ONE:
        weight_E += 1.0
    else:
        x_E = rounded(x_E, DTYPE)
    return rounded(tl.fma(x_E, weight_E, 0.0) if IS_ADDED else x_E * weight_E, DTYPE)


@triton.jit
def norm_kernel(
    x, residual, weight, inner, normed, codes, scales, static_scale, zero_point, stride_x, stride_residual,
    stride_scale, eps, NUM_FEATURES: tl.constexpr, PLUS_ONE: tl.constexpr, GROUP: tl.constexpr,
    HALF_RANGE: tl.constexpr, IS_FLOAT8: tl.constexpr, HAS_FLOAT8: tl.constexpr, EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A program: one row of x. residual: read and written. Some of it, inner and the results are None."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    is_there = column < NUM_FEATURES
    weight_E = tl.load(weight + column, mask=is_there, other=0.0).to(tl.float32)
    if inner is not None:
        inner_E = tl.load(inner + column, mask=is_there, other=0.0).to(tl.float32)
    if EARLY:
        gdc_wait()
    x_E = tl.load(x + token * stride_x + column, mask=is_there, other=0.0).to(tl.float32)
    if inner is not None:
        x_E = normed_row(x_E, inner_E, eps, NUM_FEATURES, PLUS_ONE, True, DTYPE)
    if residual is not None:
        at = residual + token * stride_residual + column
        x_E = rounded(x_E + tl.load(at, mask=is_there, other=0.0).to(tl.float32), DTYPE)
        tl.store(at, x_E.to(DTYPE), mask=is_there)
    if EARLY:
        gdc_launch_dependents()
    x_E = normed_row(x_E, weight_E, eps, NUM_FEATURES, PLUS_ONE, False, DTYPE)
    if normed is not None:
        tl.store(normed + token * NUM_FEATURES + column, x_E.to(DTYPE), mask=is_there)
    else:
        store_codes(
            x_E, codes + token * NUM_FEATURES, scales + token * stride_scale, static_scale, zero_point, column, 0,
            NUM_FEATURES, GROUP, HALF_RANGE, IS_FLOAT8, HAS_FLOAT8, DTYPE,
        )  # fmt: skip


_norm = Launcher(norm_kernel)


def launch(x_TE: Tensor, residual_TE: Tensor | None, norm: Norm, *, num_warps: int | None = None) -> Tensor:
    """`rms_norm` without the operator around it."""
    check(x_TE, residual_TE, norm)
    normed_TE = x_TE.new_empty(x_TE.shape)
    _run(x_TE, residual_TE, norm, (normed_TE, None, None, None, None), 0, (0, 1.0, False, False), num_warps)
    return normed_TE


def launch_codes(
    x_TE: Tensor, residual_TE: Tensor | None, norm: Norm, codes: Codes, *, num_warps: int | None = None
) -> tuple[Tensor, Tensor]:
    """`rms_norm_codes` without the operator around it."""
    check(x_TE, residual_TE, norm)
    codes.check(x_TE.shape[1])
    codes_TE, scale_TG = codes.empty(x_TE, x_TE.shape[1])
    results = (None, as_bytes(codes_TE), scale_TG, codes.static_scale, codes.zero_point)
    how = constants(codes, x_TE.device)
    _run(x_TE, residual_TE, norm, results, scale_TG.stride(0), how, num_warps)
    return codes_TE, scale_TG


def _run(
    x_TE: Tensor,
    residual_TE: Tensor | None,
    norm: Norm,
    results: tuple[Tensor | None, ...],
    stride_scale: int,
    how: tuple[int, float, bool, bool],
    num_warps: int | None,
) -> None:
    num_tokens, num_features = x_TE.shape
    if num_tokens == 0:
        return
    block = power_above(num_features)
    early = starts_early(x_TE.device)
    strides = (x_TE.stride(0), 0 if residual_TE is None else residual_TE.stride(0), stride_scale)
    _norm(
        (num_tokens, 1),
        (x_TE, residual_TE, norm.weight_E, norm.inner_E, *results, *strides, norm.eps),
        (num_features, norm.plus_one, *how, early, block),
        num_warps=num_warps or warps_for(block),
        early=early,
    )
