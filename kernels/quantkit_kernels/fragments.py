"""INT4 codes in fragment order to matrices that `tl.dot` takes: what Triton kernels share of that layout.

    packed [N / 16, K / 64, 32 lanes, 16 bytes]      lane (g, t) has rows g and g + 8, columns 32 h + 8 t + c, c = 0 … 7

    4 bytes = 1 word: columns 4 j … 4 j + 3 of those 8, nibbles from bit 0
        g:0  g+8:0  g:2  g+8:2 | g:1  g+8:1  g:3  g+8:3          u = code + 8

Each of the functions below turns such words, four bytes of one row of the loaded tensor, into four values of row g and
four of row g + 8, in order of columns. Then a permutation of axes puts values where they belong, which moves nothing
between threads: a thread's 16 bytes become runs of 8 columns.

    int8     16 · code: the nibble, sign bit flipped, is a two's complement number in the upper half of a byte
    e4m3     code · 2^-9: the bits 0 … 15 are the numbers 0 … 15 times 2^-9, subnormal or not; a sign is put before them
    bf16     code: the nibble is the end of the mantissa of 128 + u (fp16: 1024 + u); 136 (1032) is subtracted, exactly
"""

import triton
import triton.language as tl


@triton.jit
def load_fragments(packed, strip, block, num_strips, num_blocks, STRIPS: tl.constexpr, BLOCKS: tl.constexpr):
    """Bytes of STRIPS × BLOCKS pieces, int8 [STRIPS, 512 · BLOCKS]; beyond the last strip or block: zeros."""
    strips = strip + tl.arange(0, STRIPS)[:, None]
    at = tl.arange(0, BLOCKS * 512)[None, :]
    is_there = (strips < num_strips) & (block + at // 512 < num_blocks)
    where = strips.to(tl.int64) * (num_blocks * 512) + block * 512 + at
    return tl.load(packed + where, mask=is_there, other=0)


@triton.jit
def rows_of(low, high, STRIPS: tl.constexpr, BLOCKS: tl.constexpr):
    """Values of rows g and of rows g + 8, each as the bytes were, to [16 · STRIPS, 64 · BLOCKS]."""
    both = tl.reshape(tl.join(low, high), (STRIPS, BLOCKS, 8, 4, 2, 8, 2))  # strip, block, g, t, h, c, below
    return tl.reshape(tl.permute(both, (0, 6, 2, 1, 4, 3, 5)), (16 * STRIPS, 64 * BLOCKS))


@triton.jit
def halves(w_NK):
    """[N, 64] to its columns below 32 and from 32 on."""
    return tl.split(tl.permute(tl.reshape(w_NK, (w_NK.shape[0], 2, 32)), (0, 2, 1)))


@triton.jit
def as_int8(packed):
    """16 · code."""
    return tl.inline_asm_elementwise(
        """{ .reg .b32 p, q;
        prmt.b32 p, $2, 0, 0x3120;
        shl.b32 q, p, 4;
        lop3.b32 $0, q, 0xF0F0F0F0, 0x80808080, 0x6A;
        lop3.b32 $1, p, 0xF0F0F0F0, 0x80808080, 0x6A; }""",
        "=r,=r,r", [packed], dtype=(tl.int8, tl.int8), is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def as_unsigned(packed):
    """u = code + 8, int8."""
    return tl.inline_asm_elementwise(
        """{ .reg .b32 p, q;
        prmt.b32 p, $2, 0, 0x3120;
        shr.u32 q, p, 4;
        and.b32 $0, p, 0x0F0F0F0F;
        and.b32 $1, q, 0x0F0F0F0F; }""",
        "=r,=r,r", [packed], dtype=(tl.int8, tl.int8), is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def as_e4m3(packed):
    """code · 2^-9 as the bits of e4m3: s, 1 where the code is negative; ((u & 7) ^ 7 s) + s, and s << 7."""
    low, high = tl.inline_asm_elementwise(
        """{ .reg .b32 p, q, s, t, m;
        prmt.b32 p, $2, 0, 0x3120;
        shr.u32 s, p, 3;
        lop3.b32 s, s, 0x01010101, 0x01010101, 0x6A;
        mul.lo.u32 t, s, 7;
        lop3.b32 m, p, 0x07070707, t, 0x6A;
        mad.lo.u32 $0, s, 129, m;
        shr.u32 q, p, 4;
        shr.u32 s, p, 7;
        lop3.b32 s, s, 0x01010101, 0x01010101, 0x6A;
        mul.lo.u32 t, s, 7;
        lop3.b32 m, q, 0x07070707, t, 0x6A;
        mad.lo.u32 $1, s, 129, m; }""",
        "=r,=r,r", [packed], dtype=(tl.int8, tl.int8), is_pure=True, pack=4,
    )  # fmt: skip
    return low.to(tl.float8e4nv, bitcast=True), high.to(tl.float8e4nv, bitcast=True)


@triton.jit
def signed_as_e4m3(values):
    """Integers of -15 … 15, int8, times 2^-9 in e4m3."""
    bits = tl.where(values < 0, 128 - values.to(tl.int16), values.to(tl.int16))
    return bits.to(tl.int8).to(tl.float8e4nv, bitcast=True)


@triton.jit
def as_bf16(packed):
    """code: 128 + u, less 136."""
    return tl.inline_asm_elementwise(
        """{ .reg .b32 q, one, less;
        mov.b32 one, 0x3F803F80;
        mov.b32 less, 0xC308C308;
        lop3.b32 q, $4, 0x000F000F, 0x43004300, 0xEA;
        fma.rn.bf16x2 $0, q, one, less;
        shr.u32 q, $4, 8;
        lop3.b32 q, q, 0x000F000F, 0x43004300, 0xEA;
        fma.rn.bf16x2 $1, q, one, less;
        shr.u32 q, $4, 4;
        lop3.b32 q, q, 0x000F000F, 0x43004300, 0xEA;
        fma.rn.bf16x2 $2, q, one, less;
        shr.u32 q, $4, 12;
        lop3.b32 q, q, 0x000F000F, 0x43004300, 0xEA;
        fma.rn.bf16x2 $3, q, one, less; }""",
        "=r,=r,=r,=r,r", [packed], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def as_fp16(packed):
    """code: 1024 + u, less 1032."""
    return tl.inline_asm_elementwise(
        """{ .reg .b32 q, less;
        mov.b32 less, 0x64086408;
        lop3.b32 q, $4, 0x000F000F, 0x64006400, 0xEA;
        sub.f16x2 $0, q, less;
        shr.u32 q, $4, 8;
        lop3.b32 q, q, 0x000F000F, 0x64006400, 0xEA;
        sub.f16x2 $1, q, less;
        shr.u32 q, $4, 4;
        lop3.b32 q, q, 0x000F000F, 0x64006400, 0xEA;
        sub.f16x2 $2, q, less;
        shr.u32 q, $4, 12;
        lop3.b32 q, q, 0x000F000F, 0x64006400, 0xEA;
        sub.f16x2 $3, q, less; }""",
        "=r,=r,=r,=r,r", [packed], dtype=(tl.float16, tl.float16), is_pure=True, pack=4,
    )  # fmt: skip
