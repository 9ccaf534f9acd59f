"""Roundings that Triton kernels share, in float32 arithmetic alone.

No conversion instructions: e4m3 ones exist from sm_89 on, and the interpreter has neither e4m3 nor bfloat16 that can
be trusted. Adding and subtracting 1.5 · 2^23 units rounds to a multiple of the unit, halves to even.
"""

import triton
import triton.language as tl

E4M3_MAX = tl.constexpr(448.0)
_ROUND = tl.constexpr(12582912.0)  # 1.5 · 2^23


@triton.jit
def round_even(x):
    """Nearest integer, halves to even, of float32 below 2^22."""
    return (x + _ROUND) - _ROUND


@triton.jit
def power_below(x):
    """The power of two at or below |x|, float32; 0 for subnormal numbers."""
    return (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def round_e4m3(x):
    """Nearest e4m3 value of float32 within ±448, halves to even, as float32."""
    step = tl.maximum(
        power_below(x), 0.015625
    )  # subnormal below 2^-6; 8 steps from one power of two to the next
    magic = step * (_ROUND * 0.125)
    return (x + magic) - magic


@triton.jit
def e4m3_bits(value):
    """The byte that encodes an e4m3 value, int8: float16 of value · 2^-8 has the same bits one exponent wider."""
    half = (value * 0.00390625).to(tl.float16).to(tl.int16, bitcast=True)
    return (((half >> 7) & 0x7F) | ((half >> 8) & 0x80)).to(tl.int8)


@triton.jit
def round_bfloat16(x):
    """Nearest bfloat16 of finite float32, halves to even, as float32."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    return bits.to(tl.float32, bitcast=True)
