"""Rows as codes on a GPU: the arithmetic that fused kernels share, and the kernel that does nothing else.

A program holds a row, or a part of it with whole groups, in registers: read once, written once.

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
from quantkit_kernels.row_codes import Codes, check_rows
from quantkit_kernels.triton_launch import Launcher, power_above

ELEMENTS_OF_A_WARP = 512  # 16 of a thread: two loads of 16 bytes of each operand in flight
_ROUND = tl.constexpr(12582912.0)  # 1.5 · 2^23: a sum with it ends in the integer's bits
_TINY_SCALE, _LIFT = tl.constexpr(2.0**-64), tl.constexpr(2.0**64)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """float32 as what the model's dtype keeps of it."""
    return x.to(DTYPE).to(tl.float32)


@triton.jit
def amax_of(x, AXIS: tl.constexpr):
    """The largest |x|, float32; NaN if any is: as integers, NaN is the largest."""
    return tl.max(tl.abs(x).to(tl.int32, bitcast=True), axis=AXIS).to(tl.float32, bitcast=True)


@triton.jit
def scale_of(amax, half_range, DTYPE: tl.constexpr):
    """The scale that puts amax at half_range, never 0."""
    eps: tl.constexpr = 2.0**-7 if tl.bfloat16 == DTYPE else (2.0**-10 if tl.float16 == DTYPE else 2.0**-23)
    scale = rounded(tl.div_rn(amax, tl.full(amax.shape, half_range, tl.float32)), DTYPE)
    return tl.where(scale == 0, eps, scale)


@triton.jit
def scaled_by(x, scale, DTYPE: tl.constexpr):
    """x / scale, rounded to the model's dtype; scale: broadcast against x.

    Between two bf16 numbers' quotient and the middle of two others there are at least 2^-17 of it, so that one
    reciprocal per scale, good to 2^-22, rounds like a division. float16 and float32 have no such room.
    """
    if tl.bfloat16 == DTYPE:
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
        scale = scale_of(amax_of(x_K, 0), HALF_RANGE, DTYPE)
        tl.store(scales, scale)
        scaled_K = scaled_by(x_K, scale, DTYPE)
    else:
        x_GK = tl.reshape(x_K, (x_K.shape[0] // GROUP, GROUP))
        scale_G = scale_of(amax_of(x_GK, 1), HALF_RANGE, DTYPE)
        group = first_group + tl.arange(0, x_K.shape[0] // GROUP)
        tl.store(scales + group, scale_G, mask=group * GROUP < num_features)
        scaled_K = tl.reshape(scaled_by(x_GK, scale_G[:, None], DTYPE), x_K.shape)
    code_K = code_of(scaled_K, offset, IS_FLOAT8, HAS_FLOAT8, DTYPE)
    # as many codes of a thread as it loads elements: wider stores would have the elements laid out for them, and a
    # kernel's sums would have another order than without codes
    at = tl.multiple_of(codes + column, 128 // DTYPE.primitive_bitwidth)
    tl.store(at, code_K, mask=column < num_features)


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


_quantize = Launcher(quantize_rows_kernel)


def launch(x_TK: Tensor, codes: Codes, *, num_warps: int | None = None) -> tuple[Tensor, Tensor]:
    """`quantize_rows` without the operator around it."""
    num_tokens, num_features = x_TK.shape
    check_rows(x_TK)
    codes.check(num_features)
    codes_TK, scale_TG = codes.empty(x_TK, num_features)
    block = power_above(num_features)
    early = starts_early(x_TK.device)
    if num_tokens > 0:
        strides = (x_TK.stride(0), scale_TG.stride(0))
        _quantize(
            (num_tokens, 1),
            (x_TK, as_bytes(codes_TK), scale_TG, codes.static_scale, codes.zero_point, *strides),
            (num_features, *constants(codes, x_TK.device), early, block),
            num_warps=num_warps or warps_for(block),
            early=early,
        )
    return codes_TK, scale_TG


def constants(codes: Codes, device: torch.device) -> tuple[int, float, bool, bool]:
    """GROUP, HALF_RANGE, IS_FLOAT8 and HAS_FLOAT8 of kernels that choose codes."""
    return codes.group, codes.half_range, codes.is_float8, converts_float8(device)


def as_bytes(codes: Tensor) -> Tensor:
    """Codes of 8 bits as int8: kernels store bits, not values."""
    return codes.view(torch.int8)


def warps_for(block: int) -> int:
    """Warps of a program that holds a row of `block` elements; of the width alone, so that a batch changes nothing."""
    return min(max(block // ELEMENTS_OF_A_WARP, 1), 32)
