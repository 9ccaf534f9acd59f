"""What decode and prefill attention share: rows of queries against a run of tokens read from pages.

A tile of rows is all query heads that share one head of keys, token by token: row r is query r % GROUP of new token
r // GROUP, so a K/V tile is read once for the whole group.

    codes as they are      [TILE, D]      one plane:  k, v converted element by element
    codes as words         [TILE, D / 4]  four planes: word w holds elements 4w … 4w + 3; plane j is element j of every
                                          word, so that two words (two tokens of v) give pairs ready for the MMA with
                                          one byte permutation: 8-bit codes never go through shared memory one by one

    score [rows, TILE] = Σ_j q_j · k_jᵀ · scale      acc_j [rows, D / 4] += p · v_j      out[4w + j] = acc_j[w] / total

Codes become fp16, exactly. q is fp16 then too: rows of bf16 are first divided by a power of two, which is returned
to the scores in float32. The scale of a key multiplies scores; the logarithm of that of a value is added to them, so
that their exponentials are what multiplies v, p · scale, at most 1 whatever the scales are; divided by the scale again
they are added up.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit_kernels.capability import converts_float8
from quantkit_kernels.paged_kv import KVPool, Masking

WARPGROUP_ROWS = tl.constexpr(
    64
)  # from here on the MMA of Hopper takes k and v from shared memory, in 16 bits
LOG2_E = 1.4426950408889634
TWO_LOG2_E = tl.constexpr(2 * LOG2_E)
NOTHING = tl.constexpr(-1e30)  # a maximum of no scores: finite, so that differences of maxima are numbers


@triton.jit
def _e4m3_planes(word):
    """Two words of four e4m3 codes to four pairs of fp16."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 low, high;
        .reg .b16 first, second;
        prmt.b32 low, $4, $5, 0x5140;
        prmt.b32 high, $4, $5, 0x7362;
        mov.b32 {first, second}, low;
        cvt.rn.f16x2.e4m3x2 $0, first;
        cvt.rn.f16x2.e4m3x2 $1, second;
        mov.b32 {first, second}, high;
        cvt.rn.f16x2.e4m3x2 $2, first;
        cvt.rn.f16x2.e4m3x2 $3, second;
        }
        """,
        "=r,=r,=r,=r,r,r",
        [word],
        dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def _int8_planes(word):
    """Two words of four int8 codes to four pairs of fp16: code + 128 under the exponent of 1024, minus 1152."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 low, high, middle;
        prmt.b32 low, $4, $5, 0x5140;
        prmt.b32 high, $4, $5, 0x7362;
        xor.b32 low, low, 0x80808080;
        xor.b32 high, high, 0x80808080;
        mov.b32 middle, 0x64806480;
        prmt.b32 $0, low, 0x64646464, 0x4140;
        prmt.b32 $1, low, 0x64646464, 0x4342;
        prmt.b32 $2, high, 0x64646464, 0x4140;
        prmt.b32 $3, high, 0x64646464, 0x4342;
        sub.rn.f16x2 $0, $0, middle;
        sub.rn.f16x2 $1, $1, middle;
        sub.rn.f16x2 $2, $2, middle;
        sub.rn.f16x2 $3, $3, middle;
        }
        """,
        "=r,=r,=r,=r,r,r",
        [word],
        dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def _int8_values(code):
    """As `_int8_planes`, of codes side by side."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 shifted, middle;
        xor.b32 shifted, $2, 0x80808080;
        mov.b32 middle, 0x64806480;
        prmt.b32 $0, shifted, 0x64646464, 0x4140;
        prmt.b32 $1, shifted, 0x64646464, 0x4342;
        sub.rn.f16x2 $0, $0, middle;
        sub.rn.f16x2 $1, $1, middle;
        }
        """,
        "=r,=r,r",
        [code],
        dtype=tl.float16,
        is_pure=True,
        pack=4,
    )


@triton.jit
def _from_bits(byte, FORMAT: tl.constexpr):
    """One code in the low bits of an int32, by arithmetic: where there is no instruction for it."""
    if FORMAT == "int8":
        return ((byte << 24) >> 24).to(tl.float16)
    else:  # the bits of e4m3 are those of a float16 2^8 times smaller
        bits = ((byte & 0x80) << 8) | ((byte & 0x7F) << 7)
        return bits.to(tl.int16).to(tl.float16, bitcast=True) * 256.0


@triton.jit
def planes(x, FORMAT: tl.constexpr, PLANES: tl.constexpr, CONVERTS: tl.constexpr):
    """Stored elements to a tuple of planes for the MMA. CONVERTS: the device has instructions for it (e4m3: sm_89)."""
    if FORMAT == "16-bit":
        return (x,)
    elif PLANES == 1:
        if not CONVERTS:
            return (_from_bits(x.to(tl.int32) & 0xFF, FORMAT),)
        elif FORMAT == "int8":
            return (_int8_values(x),)
        else:
            return (x.to(tl.float8e4nv, bitcast=True).to(tl.float16),)
    elif not CONVERTS:
        return (
            _from_bits(x & 0xFF, FORMAT), _from_bits((x >> 8) & 0xFF, FORMAT),
            _from_bits((x >> 16) & 0xFF, FORMAT), _from_bits((x >> 24) & 0xFF, FORMAT),
        )  # fmt: skip
    elif FORMAT == "int8":
        a, b, c, d = _int8_planes(x)
        return (a, b, c, d)
    else:
        a, b, c, d = _e4m3_planes(x)
        return (a, b, c, d)


@triton.jit
def load_queries(at_M, is_row_M, DTYPE: tl.constexpr, NORMALISE: tl.constexpr, D: tl.constexpr, WORDS: tl.constexpr,
                 PLANES: tl.constexpr):  # fmt: skip
    """Planes of the queries that rows point at, and the power of two that multiplies their scores, float32 [rows]."""
    element = tl.arange(0, WORDS * PLANES)
    q_MD = tl.load(
        at_M[:, None] + element[None, :], mask=is_row_M[:, None] & (element < D)[None, :], other=0.0
    )
    factor_M = tl.full(at_M.shape, 1.0, dtype=tl.float32)
    if NORMALISE:  # only the exponent, so that dividing rounds nothing
        q_MD = q_MD.to(tl.float32)
        amax_M = tl.max(tl.abs(q_MD), axis=1)
        power_M = (amax_M.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        factor_M = tl.where((power_M > 0) & (amax_M < float("inf")), power_M, 1.0)
        q_MD = q_MD / factor_M[:, None]
    q_MD = q_MD.to(DTYPE)
    if PLANES == 1:
        return (q_MD,), factor_M
    else:
        even, odd = tl.split(tl.reshape(q_MD, (at_M.shape[0], WORDS, 2, 2)))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        return (first, second, third, fourth), factor_M


@triton.jit
def _blocks(table, start, lowest, stop, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """Blocks of the TILE tokens from `start` on, a tuple of numbers; 0 where there is no token to read."""
    blocks = ()
    for j in tl.static_range((TILE + BLOCK_SIZE - 1) // BLOCK_SIZE):
        number = start // BLOCK_SIZE + j
        is_read = (number * BLOCK_SIZE < stop) & ((number + 1) * BLOCK_SIZE > lowest)
        blocks = blocks + (tl.load(table + number, mask=is_read, other=0),)
    return blocks


@triton.jit
def _of_tokens(blocks, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """The block of each token of a tile, int64 [TILE]; one number where it is the same for all."""
    if TILE <= BLOCK_SIZE:
        return blocks[0].to(tl.int64)
    else:
        place = tl.arange(0, TILE) // BLOCK_SIZE
        block = tl.where(place == 0, blocks[0], blocks[1])
        for j in tl.static_range(2, TILE // BLOCK_SIZE):
            block = tl.where(place == j, blocks[j], block)
        return block.to(tl.int64)


@triton.jit
def _scales(k_scale, v_scale, at, is_token, MASKED: tl.constexpr, IS_WIDE: tl.constexpr):
    """Of a tile's tokens: scale of the key, log2 and inverse of the scale of the value.

    In one load: of fewer numbers than there are threads, every thread would read all that it needs.
    """
    if IS_WIDE:
        at_record = k_scale + at[:, None] * 4 + tl.arange(0, 4)[None, :]
        record = tl.load(at_record, mask=is_token[:, None] if MASKED else None, other=0.0 if MASKED else None)
        even, odd = tl.split(tl.reshape(record, (at.shape[0], 2, 2)))
        key_scale, inverse = tl.split(even)
        log_scale, _ = tl.split(odd)
        return key_scale, log_scale, inverse
    else:
        to_values = tl.arange(0, 2) * ((v_scale.to(tl.int64) - k_scale.to(tl.int64)) // 4)
        both = tl.load(k_scale + at[:, None] + to_values[None, :], mask=is_token[:, None], other=0.0)
        key_scale, value_scale = tl.split(both)
        value_scale = tl.maximum(value_scale, 1e-30)
        return key_scale, tl.log2(value_scale), 1.0 / value_scale


@triton.jit
def attend(
    q, row_scale_M, position_M, acc, m_M, total_M, first, lowest, stop,
    k, v, k_scale, v_scale, table, stride_block, stride_token, scale_block, window, soft_cap,
    FORMAT: tl.constexpr, PER_TOKEN: tl.constexpr, IS_WIDE: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr, MASKED: tl.constexpr, CONVERTS: tl.constexpr, D: tl.constexpr, WORDS: tl.constexpr,
    PLANES: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Go over tokens first, first + TILE … < stop: (acc, m, total) with them.

    k, v, their scales, table: of the head and sequence. IS_WIDE: k_scale holds records, as
    `attention_widen` leaves them, which stand for row_scale too.
    Not MASKED: every row sees every one of them, and stop − first is a multiple of TILE. MASKED: tokens before `lowest`
    are read by no row, and their blocks may be gone.
    """
    SCALES_LATE: tl.constexpr = not (MASKED or HAS_CAP)  # −inf · 0 would not be a score
    tile = tl.arange(0, TILE)
    word = tl.arange(0, WORDS)
    blocks = _blocks(table, first, lowest, stop, BLOCK_SIZE, TILE)
    for start in tl.range(first, stop, TILE, num_stages=STAGES):
        token = start + tile
        slot = token % BLOCK_SIZE
        block = _of_tokens(blocks, BLOCK_SIZE, TILE)
        blocks = _blocks(table, start + TILE, lowest, stop, BLOCK_SIZE, TILE)  # read ahead
        at = (block * stride_block + slot * stride_token)[:, None] + word[None, :]
        at_scale = block * scale_block + slot
        is_token = (token >= lowest) & (token < stop)
        is_there = tl.full((TILE, WORDS), True, dtype=tl.int1)
        if MASKED:
            is_there = is_there & is_token[:, None]
        if WORDS * PLANES != D:
            is_there = is_there & (word < D // PLANES)[None, :]
        if MASKED or WORDS * PLANES != D:
            k_CD = tl.load(k + at, mask=is_there, other=0)
            v_CD = tl.load(v + at, mask=is_there, other=0)
        else:
            k_CD = tl.load(k + at)
            v_CD = tl.load(v + at)

        k_planes = planes(k_CD, FORMAT, PLANES, CONVERTS)
        score = tl.dot(q[0], tl.trans(k_planes[0]))
        for j in tl.static_range(1, PLANES):
            score = tl.dot(q[j], tl.trans(k_planes[j]), score)
        if PER_TOKEN:
            key_scale, log_scale, inverse = _scales(k_scale, v_scale, at_scale, is_token, MASKED, IS_WIDE)
            score *= key_scale[None, :]
        if not (SCALES_LATE or (PER_TOKEN and IS_WIDE)):
            score *= row_scale_M[:, None]
        if HAS_CAP:
            score = soft_cap * (1.0 - 2.0 / (tl.exp2(score * (TWO_LOG2_E / soft_cap)) + 1.0))  # tanh
        if MASKED:
            is_seen = (token[None, :] <= position_M[:, None]) & is_token[None, :]
            if HAS_WINDOW:
                is_seen = is_seen & (token[None, :] > position_M[:, None] - window)
            score = tl.where(is_seen, score, -float("inf"))
        if PER_TOKEN:
            if SCALES_LATE and not IS_WIDE:
                score *= row_scale_M[:, None]
            score += log_scale[None, :]
            next_m_M = tl.maximum(m_M, tl.max(score, axis=1))
            p = tl.exp2(score - next_m_M[:, None])
        elif SCALES_LATE:
            next_m_M = tl.maximum(m_M, tl.max(score, axis=1) * row_scale_M)
            p = tl.exp2(score * row_scale_M[:, None] - next_m_M[:, None])
        else:
            next_m_M = tl.maximum(m_M, tl.max(score, axis=1))
            p = tl.exp2(score - next_m_M[:, None])
        shrink_M = tl.exp2(m_M - next_m_M)
        if PER_TOKEN:
            total_M = total_M * shrink_M + tl.sum(p * inverse[None, :], axis=1)
        else:
            total_M = total_M * shrink_M + tl.sum(p, axis=1)
        m_M = next_m_M
        v_planes = planes(v_CD, FORMAT, PLANES, CONVERTS)
        p = p.to(v_planes[0].dtype)
        grown = ()
        for j in tl.static_range(PLANES):
            grown = grown + (tl.dot(p, v_planes[j], acc[j] * shrink_M[:, None]),)
        acc = grown
    return acc, m_M, total_M


@triton.jit
def zeros(ROWS: tl.constexpr, WORDS: tl.constexpr, PLANES: tl.constexpr):
    """Accumulators of a tile that has seen nothing."""
    acc = ()
    for _ in tl.static_range(PLANES):
        acc = acc + (tl.zeros((ROWS, WORDS), dtype=tl.float32),)
    return acc


@triton.jit
def interleave(acc, PLANES: tl.constexpr):
    """Planes back to elements: [rows, PLANES · WORDS]."""
    if PLANES == 1:
        return acc[0]
    else:
        pairs = tl.join(tl.join(acc[0], acc[2]), tl.join(acc[1], acc[3]))
        return tl.reshape(pairs, (acc[0].shape[0], acc[0].shape[1] * 4))


def stored(pool: KVPool, *, as_words: bool) -> tuple[Tensor, Tensor, int, int]:
    """k and v as a kernel reads them, how many of these elements it reads of a head (a power of two), and planes.

    as_words: 8-bit codes in words of four, if heads are whole words of them.
    """
    k_PHSD, v_PHSD = pool.k_PHSD, pool.v_PHSD
    head_dim, planes = k_PHSD.shape[3], 1
    if k_PHSD.itemsize == 1:
        places = (head_dim, *k_PHSD.stride()[:3], k_PHSD.data_ptr(), v_PHSD.data_ptr())
        planes = 4 if as_words and all(place % 4 == 0 for place in places) else 1
        dtype = torch.int32 if planes == 4 else torch.int8
        k_PHSD, v_PHSD = k_PHSD.view(dtype), v_PHSD.view(dtype)
    return k_PHSD, v_PHSD, max(16, triton.next_power_of_2(triton.cdiv(head_dim, planes))), planes


def constants(
    q_TQD: Tensor, pool: KVPool, masking: Masking
) -> tuple[str, bool, bool, bool, bool, bool, bool]:
    """FORMAT, HAS_SCALE, PER_TOKEN, NORMALISE, HAS_WINDOW, HAS_CAP, CONVERTS of the kernels."""
    dtype = pool.k_PHSD.dtype
    form = {torch.float8_e4m3fn: "e4m3", torch.int8: "int8"}.get(dtype, "16-bit")
    per_token = pool.k_scale is not None and pool.k_scale.dim() > 1
    normalise = q_TQD.dtype == torch.bfloat16 and dtype != torch.bfloat16
    converts = q_TQD.is_cuda and (form != "e4m3" or converts_float8(q_TQD.device))
    has_scale = pool.k_scale is not None
    return form, has_scale, per_token, normalise, masking.window > 0, masking.soft_cap > 0, converts
