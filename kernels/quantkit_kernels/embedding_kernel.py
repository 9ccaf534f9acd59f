"""`embedding` on a GPU: a program dequantizes WORDS words of one row.

Bound: bytes, of which most are written: bits / 8 read and 2 written per element.
Shape suffixes: V vocab, K features, G groups of features that share a scale, T tokens.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantkit_kernels.capability import starts_early
from quantkit_kernels.embedding import check
from quantkit_kernels.row_codes_kernel import rounded
from quantkit_kernels.triton_launch import Launcher, num_parts

WORDS, NUM_WARPS = 128, 4


@triton.jit
def gather_kernel(
    token_ids, packed, scale, rows, multiplier, NUM_WORDS: tl.constexpr, NUM_FEATURES: tl.constexpr,
    NUM_GROUPS: tl.constexpr, BITS: tl.constexpr, HAS_MULTIPLIER: tl.constexpr, EARLY: tl.constexpr,
    WORDS: tl.constexpr,
):  # fmt: skip
    """A program: WORDS words of one row."""
    DTYPE: tl.constexpr = scale.dtype.element_ty
    CODES: tl.constexpr = 32 // BITS
    token = tl.program_id(0).to(tl.int64)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.load(token_ids + token).to(tl.int64)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    bits = tl.load(packed + row * NUM_WORDS + word, mask=word < NUM_WORDS, other=0)
    place = tl.arange(0, CODES)
    column = word[:, None] * CODES + place[None, :]
    is_there = column < NUM_FEATURES
    code = ((bits[:, None] >> (place * BITS)[None, :]) & ((1 << BITS) - 1)) - (1 << (BITS - 1))
    group = column // (NUM_FEATURES // NUM_GROUPS)
    step = tl.load(scale + row * NUM_GROUPS + group, mask=is_there, other=0.0).to(tl.float32)
    value = rounded(code.to(tl.float32) * step, DTYPE)
    if HAS_MULTIPLIER:
        value = rounded(value * multiplier, DTYPE)
    tl.store(rows + token * NUM_FEATURES + column, value.to(DTYPE), mask=is_there)


_gather = Launcher(gather_kernel)


def launch(
    token_ids_T: Tensor,
    packed: Tensor,
    scale_VG: Tensor,
    num_features: int,
    bits: int,
    multiplier: float,
    *,
    words: int = WORDS,
    num_warps: int = NUM_WARPS,
) -> Tensor:
    """`embed_packed` without the operator around it."""
    check(token_ids_T, packed, scale_VG, num_features, bits)
    rows_TK = scale_VG.new_empty(token_ids_T.shape[0], num_features)
    early = starts_early(scale_VG.device)
    if len(token_ids_T) > 0:
        shape = (packed.shape[1], num_features, scale_VG.shape[1], bits)
        _gather(
            (len(token_ids_T), num_parts(packed.shape[1], words)),
            (token_ids_T, packed, scale_VG, rows_TK, multiplier),
            (*shape, multiplier != 1.0, early, words),
            num_warps=num_warps,
            early=early,
        )
    return rows_TK
