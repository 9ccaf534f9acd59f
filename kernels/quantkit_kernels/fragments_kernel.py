"""INT4 codes in fragment order to matrices that `tl.dot` takes: what Triton kernels share of that layout.

    packed [N / 16, K / 64, 32 lanes, 16 bytes]      lane (g, t) has rows g and g + 8, columns 32 h + 8 t + c, c = 0 … 7

    4 bytes = 1 word: columns 4 j … 4 j + 3 of those 8, nibbles from bit 0
        g:0  g+8:0  g:2  g+8:2 | g:1  g+8:1  g:3  g+8:3          u = code + 8

Each of the functions below turns a byte, one column of two rows, into a value of row g and one of row g + 8, four bytes
at a time (`pack`), each by itself: Triton may give any of them to any thread. A permutation of axes then puts values
where they belong.

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
    # strip, block, g, t, h, upper four columns of eight, odd column, upper two of four, row below
    both = tl.reshape(tl.join(low, high), (STRIPS, BLOCKS, 8, 4, 2, 2, 2, 2, 2))
    return tl.reshape(tl.permute(both, (0, 8, 2, 1, 4, 3, 5, 7, 6)), (16 * STRIPS, 64 * BLOCKS))


@triton.jit
def rows_in_order(low, high, STRIPS: tl.constexpr, BLOCKS: tl.constexpr):
    """The same for 16-bit values, columns in the order in which threads have them: `in_order` of x is to go with it."""
    both = tl.reshape(tl.join(low, high), (STRIPS, BLOCKS, 8, 4, 2, 2, 2, 2, 2))
    return tl.reshape(tl.permute(both, (0, 8, 2, 1, 4, 5, 7, 3, 6)), (16 * STRIPS, 64 * BLOCKS))


@triton.jit
def in_order(x_MK):
    """Columns of x so that those of a thread's word, 8 t + 4 i … + 3, are where a 16-bit tensor core tile has its."""
    ROWS: tl.constexpr = x_MK.shape[0]
    COLS: tl.constexpr = x_MK.shape[1]
    # half of a block, t, upper four of eight, upper two of four, odd column
    apart = tl.reshape(x_MK, (ROWS, COLS // 32, 4, 2, 2, 2))
    return tl.reshape(tl.permute(apart, (0, 1, 3, 4, 2, 5)), (ROWS, COLS))


@triton.jit
def halves(w_NK):
    """[N, 64] to its columns below 32 and from 32 on."""
    return tl.split(tl.permute(tl.reshape(w_NK, (w_NK.shape[0], 2, 32)), (0, 2, 1)))


@triton.jit
def as_int8(packed):
    """16 · code."""
    return tl.inline_asm_elementwise(
        """{ .reg .b32 q;
        shl.b32 q, $2, 4;
        lop3.b32 $0, q, 0xF0F0F0F0, 0x80808080, 0x6A;
        lop3.b32 $1, $2, 0xF0F0F0F0, 0x80808080, 0x6A; }""",
        "=&r,=&r,r", [packed], dtype=(tl.int8, tl.int8), is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def as_unsigned(packed):
    """u = code + 8, int8."""
    return tl.inline_asm_elementwise(
        """{ .reg .b32 q;
        shr.u32 q, $2, 4;
        and.b32 $0, $2, 0x0F0F0F0F;
        and.b32 $1, q, 0x0F0F0F0F; }""",
        "=&r,=&r,r", [packed], dtype=(tl.int8, tl.int8), is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def as_e4m3(packed):
    """code · 2^-9 as the bits of e4m3: s, 1 where the code is negative; ((u & 7) ^ 7 s) + s, and s << 7."""
    low, high = tl.inline_asm_elementwise(
        """{ .reg .b32 q, s, t, m;
        shr.u32 s, $2, 3;
        lop3.b32 s, s, 0x01010101, 0x01010101, 0x6A;
        mul.lo.u32 t, s, 7;
        lop3.b32 m, $2, 0x07070707, t, 0x6A;
        mad.lo.u32 $0, s, 129, m;
        shr.u32 q, $2, 4;
        shr.u32 s, $2, 7;
        lop3.b32 s, s, 0x01010101, 0x01010101, 0x6A;
        mul.lo.u32 t, s, 7;
        lop3.b32 m, q, 0x07070707, t, 0x6A;
        mad.lo.u32 $1, s, 129, m; }""",
        "=&r,=&r,r", [packed], dtype=(tl.int8, tl.int8), is_pure=True, pack=4,
    )  # fmt: skip
    return low.to(tl.float8e4nv, bitcast=True), high.to(tl.float8e4nv, bitcast=True)


@triton.jit
def less(u, zero):
    """u − zero of each byte, 0 … 15 both."""
    return tl.inline_asm_elementwise(
        """{ .reg .b32 q;
        or.b32 q, $1, 0x80808080;
        sub.u32 q, q, $2;
        xor.b32 $0, q, 0x80808080; }""",
        "=r,r,r", [u, zero], dtype=tl.int8, is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def signed_as_e4m3(values):
    """Integers of -15 … 15, int8, times 2^-9 as the bits of e4m3: magnitude, and the sign before it."""
    bits = tl.inline_asm_elementwise(
        """{ .reg .b32 s, t, m;
        shr.u32 s, $1, 7;
        and.b32 s, s, 0x01010101;
        mul.lo.u32 t, s, 255;
        xor.b32 m, $1, t;
        mad.lo.u32 $0, s, 129, m; }""",
        "=r,r", [values], dtype=tl.int8, is_pure=True, pack=4,
    )  # fmt: skip
    return bits.to(tl.float8e4nv, bitcast=True)


@triton.jit
def as_bf16(packed):
    """code: 128 + u, less 136."""
    return tl.inline_asm_elementwise(
        """{ .reg .b32 a, b, q, one, offset;
        mov.b32 one, 0x3F803F80;
        mov.b32 offset, 0xC308C308;
        prmt.b32 a, $4, 0, 0x4140;
        prmt.b32 b, $4, 0, 0x4342;
        lop3.b32 q, a, 0x000F000F, 0x43004300, 0xEA;
        fma.rn.bf16x2 $0, q, one, offset;
        lop3.b32 q, b, 0x000F000F, 0x43004300, 0xEA;
        fma.rn.bf16x2 $1, q, one, offset;
        shr.u32 q, a, 4;
        lop3.b32 q, q, 0x000F000F, 0x43004300, 0xEA;
        fma.rn.bf16x2 $2, q, one, offset;
        shr.u32 q, b, 4;
        lop3.b32 q, q, 0x000F000F, 0x43004300, 0xEA;
        fma.rn.bf16x2 $3, q, one, offset; }""",
        "=&r,=&r,=&r,=&r,r", [packed], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def as_fp16(packed):
    """code: 1024 + u, less 1032."""
    return tl.inline_asm_elementwise(
        """{ .reg .b32 a, b, q, offset;
        mov.b32 offset, 0x64086408;
        prmt.b32 a, $4, 0, 0x4140;
        prmt.b32 b, $4, 0, 0x4342;
        lop3.b32 q, a, 0x000F000F, 0x64006400, 0xEA;
        sub.f16x2 $0, q, offset;
        lop3.b32 q, b, 0x000F000F, 0x64006400, 0xEA;
        sub.f16x2 $1, q, offset;
        shr.u32 q, a, 4;
        lop3.b32 q, q, 0x000F000F, 0x64006400, 0xEA;
        sub.f16x2 $2, q, offset;
        shr.u32 q, b, 4;
        lop3.b32 q, q, 0x000F000F, 0x64006400, 0xEA;
        sub.f16x2 $3, q, offset; }""",
        "=&r,=&r,=&r,=&r,r", [packed], dtype=(tl.float16, tl.float16), is_pure=True, pack=4,
    )  # fmt: skip
