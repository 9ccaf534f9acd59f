"""Rows of activations as INT8 or FP8 codes with float32 scales, and the arithmetic that fused kernels share for it.

    x [T, K]   ->   codes [T, K], one byte each      scale [T, G], float32

    dynamic    G = 1, or K / group: amax of those columns / 127.5 (INT8) or / 448 (e4m3), a zero scale becomes eps
    static     one stored scale (and zero point) for all; every row of `scale` holds it

Each step is rounded to the dtype of x, as the runtime's reference does: scale, x / scale, and what the zero point makes
of it. So a scale in float32 is exactly a bf16 number, and the codes do not depend on which kernel chose them.

Bound: 2 bytes read and 1 written per element of a bf16 matrix: memory.
Shape suffixes: T tokens, K features, G groups of features that share a scale.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantkit_kernels.capability import converts_float8, starts_early
from quantkit_kernels.rounding import E4M3_MAX, e4m3_bits, round_e4m3

HALF_RANGE = {torch.int8: 127.5, torch.float8_e4m3fn: 448.0}
ELEMENTS_OF_A_WARP = 1024  # 32 of a thread: four loads of 16 bytes in flight
MAX_FEATURES = 65536
_ROUND = tl.constexpr(12582912.0)  # 1.5 · 2^23: a sum with it ends in the integer's bits
_TINY_SCALE, _LIFT = tl.constexpr(2.0**-64), tl.constexpr(2.0**64)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """float32 as what the model's dtype keeps of it."""
    return x.to(DTYPE).to(tl.float32)


@triton.jit
def scale_of(amax, half_range, DTYPE: tl.constexpr):
    """The scale that puts amax at half_range, never 0."""
    eps: tl.constexpr = 2.0**-7 if DTYPE == tl.bfloat16 else (2.0**-10 if DTYPE == tl.float16 else 2.0**-23)
    scale = rounded(tl.div_rn(amax, tl.full(amax.shape, half_range, tl.float32)), DTYPE)
    return tl.where(scale == 0, eps, scale)


@triton.jit
def scaled_by(x, scale, DTYPE: tl.constexpr):
    """x / scale, rounded to the model's dtype; scale: broadcast against x.

    Between two bf16 numbers' quotient and the middle of two others there are at least 2^-17 of it, so that one
    reciprocal per scale, good to 2^-22, rounds like a division. float16 and float32 have no such room.
    """
    if DTYPE == tl.bfloat16:
        lift = tl.where(scale < _TINY_SCALE, _LIFT, 1.0)  # or the reciprocal would overflow
        return rounded((x * lift) * (1.0 / (scale * lift)), DTYPE)
    return rounded(tl.div_rn(x, tl.broadcast_to(scale, x.shape)), DTYPE)


@triton.jit
def code_of(scaled, zero_point, IS_FLOAT8: tl.constexpr, HAS_FLOAT8: tl.constexpr, DTYPE: tl.constexpr):
    """The byte for x / scale. zero_point: float32, or None. HAS_FLOAT8: whether the device converts to e4m3."""
    if IS_FLOAT8:
        if HAS_FLOAT8:
            return scaled.to(tl.float8e4nv).to(tl.int8, bitcast=True)  # saturates
        sign = ((scaled.to(tl.int32, bitcast=True) >> 24) & 0x80).to(tl.int8)  # of −0 too
        magnitude = e4m3_bits(round_e4m3(tl.minimum(tl.abs(scaled), E4M3_MAX)))
        return tl.where(scaled == scaled, magnitude, 0x7F) | sign
    if zero_point is not None:
        scaled = rounded(scaled + zero_point, DTYPE)
    clamped = tl.minimum(tl.maximum(scaled, -128.0), 127.0)
    return (clamped + _ROUND).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def store_codes(
    x_K, codes, scales, static_scale, zero_point, column, first_group, num_features,
    GROUP: tl.constexpr, HALF_RANGE: tl.constexpr, IS_FLOAT8: tl.constexpr, HAS_FLOAT8: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Encode columns of one row and store codes and scales. x_K: float32, values of DTYPE, 0 where masked.

    codes, scales: pointers to the row. static_scale, zero_point: pointers to one value, or None. GROUP: columns that
    share a scale, a power of two; 0: all of x_K.
    """
    offset = None
    if zero_point is not None:
        offset = rounded(tl.load(zero_point).to(tl.float32), DTYPE)
    if static_scale is not None:
        scale = rounded(tl.load(static_scale).to(tl.float32), DTYPE)
        tl.store(scales, scale)
        scaled_K = scaled_by(x_K, scale, DTYPE)
    elif GROUP == 0:
        scale = scale_of(tl.max(tl.abs(x_K), axis=0), HALF_RANGE, DTYPE)
        tl.store(scales, scale)
        scaled_K = scaled_by(x_K, scale, DTYPE)
    else:
        x_GK = tl.reshape(x_K, (x_K.shape[0] // GROUP, GROUP))
        scale_G = scale_of(tl.max(tl.abs(x_GK), axis=1), HALF_RANGE, DTYPE)
        group = first_group + tl.arange(0, x_K.shape[0] // GROUP)
        tl.store(scales + group, scale_G, mask=group * GROUP < num_features)
        scaled_K = tl.reshape(scaled_by(x_GK, scale_G[:, None], DTYPE), x_K.shape)
    code_K = code_of(scaled_K, offset, IS_FLOAT8, HAS_FLOAT8, DTYPE)
    tl.store(codes + column, code_K, mask=column < num_features)


@triton.jit
def quantize_rows_kernel(
    x, codes, scales, static_scale, zero_point, stride_x, stride_scale,
    NUM_FEATURES: tl.constexpr, GROUP: tl.constexpr, HALF_RANGE: tl.constexpr, IS_FLOAT8: tl.constexpr,
    HAS_FLOAT8: tl.constexpr, EARLY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program: one row of x."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    if EARLY:
        gdc_wait()
    x_K = tl.load(x + token * stride_x + column, mask=column < NUM_FEATURES, other=0.0).to(tl.float32)
    if EARLY:
        gdc_launch_dependents()
    store_codes(
        x_K, codes + token * NUM_FEATURES, scales + token * stride_scale, static_scale, zero_point, column, 0,
        NUM_FEATURES, GROUP, HALF_RANGE, IS_FLOAT8, HAS_FLOAT8, x.dtype.element_ty,
    )  # fmt: skip


@torch.library.custom_op("quantkit::quantize_rows", mutates_args=(), device_types="cuda")
def quantize_rows(
    x_TK: Tensor, code_dtype: torch.dtype, group: int, static_scale: Tensor | None, zero_point: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Codes [T, K] of `code_dtype` and their scale, float32 [T, G].

    x_TK: any float dtype, features contiguous. code_dtype: int8 or float8_e4m3fn. group: features that share a dynamic
    scale, a power of two that divides K; 0: all of a row. static_scale [1]: stored, makes it static; zero_point [1]:
    int8, for INT8 with a static scale.
    """
    return launch(x_TK, code_dtype, group, static_scale, zero_point)


@quantize_rows.register_fake
def _(
    x_TK: Tensor, code_dtype: torch.dtype, group: int, static_scale: Tensor | None, zero_point: Tensor | None
) -> tuple[Tensor, Tensor]:
    return empty_codes(x_TK, x_TK.shape[1], code_dtype, group)


@quantize_rows.register_kernel("cpu")
def encode_rows(
    x_TK: Tensor, code_dtype: torch.dtype, group: int, static_scale: Tensor | None, zero_point: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`quantize_rows` in plain torch, step by step in the dtype of x."""
    check_codes(x_TK.shape[1], code_dtype, group, static_scale, zero_point)
    tiles_TGK = x_TK.unflatten(1, (-1, group or x_TK.shape[1]))
    if static_scale is None:
        scale = tiles_TGK.abs().amax(dim=-1, keepdim=True) / HALF_RANGE[code_dtype]
        scale = scale.masked_fill(scale == 0, torch.finfo(x_TK.dtype).eps)
    else:
        scale = static_scale.to(x_TK.dtype).expand(len(x_TK), 1, 1)
    scaled = tiles_TGK / scale
    if zero_point is not None:
        scaled = scaled + zero_point.to(x_TK.dtype)
    codes = scaled.clamp(-448, 448) if code_dtype == torch.float8_e4m3fn else scaled.clamp(-128, 127).round()
    return codes.to(code_dtype).flatten(1), scale[..., 0].float()


def launch(
    x_TK: Tensor,
    code_dtype: torch.dtype,
    group: int,
    static_scale: Tensor | None,
    zero_point: Tensor | None,
    *,
    num_warps: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`quantize_rows` without the operator around it."""
    num_tokens, num_features = x_TK.shape
    check_rows(x_TK)
    check_codes(num_features, code_dtype, group, static_scale, zero_point)
    codes, scale = empty_codes(x_TK, num_features, code_dtype, group)
    block = triton.next_power_of_2(num_features)
    early = starts_early(x_TK.device)
    if num_tokens > 0:
        quantize_rows_kernel[(num_tokens,)](
            x_TK, codes.view(torch.int8), scale, static_scale, zero_point, x_TK.stride(0), scale.stride(0),
            num_features, group, HALF_RANGE[code_dtype], code_dtype == torch.float8_e4m3fn,
            converts_float8(x_TK.device), early, block,
            num_warps=num_warps or warps_for(block), launch_pdl=early,
        )  # fmt: skip
    return codes, scale


def empty_codes(
    like: Tensor, num_features: int, code_dtype: torch.dtype, group: int
) -> tuple[Tensor, Tensor]:
    """Codes and scales of as many rows as `like` has, to be written."""
    num_groups = num_features // group if group else 1
    return (
        like.new_empty(like.shape[0], num_features, dtype=code_dtype),
        like.new_empty(like.shape[0], num_groups, dtype=torch.float32),
    )


def check_rows(x: Tensor) -> None:
    """A matrix that a program can read a row of."""
    assert x.ndim == 2 and x.stride(1) == 1, f"rows of contiguous features, not {x.shape} by {x.stride()}"
    assert x.shape[1] <= MAX_FEATURES, f"{x.shape[1]} features, more than {MAX_FEATURES}"


def check_codes(
    num_features: int,
    code_dtype: torch.dtype,
    group: int,
    static_scale: Tensor | None,
    zero_point: Tensor | None,
) -> None:
    """What `quantize_rows` says about its options."""
    assert code_dtype in HALF_RANGE, f"codes of {code_dtype}"
    assert group == 0 or (group & (group - 1) == 0 and num_features % group == 0), f"{num_features} by {group}"
    assert static_scale is None or (static_scale.numel() == 1 and group == 0), "a static scale is one number"
    assert zero_point is None or (
        static_scale is not None and code_dtype == torch.int8 and zero_point.numel() == 1
    ), "a zero point goes with a static INT8 scale"


def warps_for(block: int, elements: int = ELEMENTS_OF_A_WARP) -> int:
    """Warps of a program that holds a row of `block` elements; of the width alone, so that a batch changes nothing."""
    return min(max(block // elements, 1), 32)
