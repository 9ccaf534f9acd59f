"""Rows of a quantized embedding table, dequantized while they are gathered.

    packed  int32 [V, K · bits / 32]   as on disk: code + 2^(bits − 1), the first column in the lowest bits
    scale   bf16  [V, G]               one per K / G columns                 ->   rows [T, K], code · scale (· multiplier)

Rounded after each product, as a model does that dequantizes its table and multiplies rows of it. A 16-bit table is
`torch.nn.functional.embedding`'s.

Bound: bytes, of which most are written: bits / 8 read and 2 written per element.
Shape suffixes: V vocab, K features, G groups of features that share a scale, T tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantkit_kernels.capability import starts_early
from quantkit_kernels.row_codes import rounded

WORDS, NUM_WARPS = 128, 4  # of a program


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


@torch.library.custom_op("quantkit::embed_packed", mutates_args=(), device_types="cuda")
def embed_packed(
    token_ids_T: Tensor, packed: Tensor, scale_VG: Tensor, num_features: int, bits: int, multiplier: float
) -> Tensor:
    """Rows [T, num_features] of the table, in the dtype of the scale.

    token_ids_T: int32 or int64, inside the table. packed: int32, of 4 or 8 bits. multiplier: what the model multiplies
    its embeddings by, a number of the scale's dtype; 1 for most.
    """
    return launch(token_ids_T, packed, scale_VG, num_features, bits, multiplier)


@embed_packed.register_fake
def _(
    token_ids_T: Tensor, packed: Tensor, scale_VG: Tensor, num_features: int, bits: int, multiplier: float
) -> Tensor:
    return scale_VG.new_empty(token_ids_T.shape[0], num_features)


@embed_packed.register_kernel("cpu")
def embed(
    token_ids_T: Tensor, packed: Tensor, scale_VG: Tensor, num_features: int, bits: int, multiplier: float
) -> Tensor:
    """`embed_packed` in plain torch."""
    _check(token_ids_T, packed, scale_VG, num_features, bits)
    ids = token_ids_T.long()
    words = packed[ids].unsqueeze(2) >> torch.arange(0, 32, bits, dtype=torch.int32)
    codes = ((words & (2**bits - 1)) - 2 ** (bits - 1)).flatten(1)[:, :num_features]
    scale_TGK = scale_VG[ids].unsqueeze(2)
    rows = codes.to(scale_VG.dtype).unflatten(1, (scale_VG.shape[1], -1)) * scale_TGK
    return rows.flatten(1) * multiplier


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
    _check(token_ids_T, packed, scale_VG, num_features, bits)
    rows_TK = scale_VG.new_empty(token_ids_T.shape[0], num_features)
    early = starts_early(scale_VG.device)
    if len(token_ids_T) > 0:
        gather_kernel[(len(token_ids_T), triton.cdiv(packed.shape[1], words))](
            token_ids_T, packed, scale_VG, rows_TK, multiplier, packed.shape[1], num_features, scale_VG.shape[1],
            bits, multiplier != 1.0, early, words, num_warps=num_warps, launch_pdl=early,
        )  # fmt: skip
    return rows_TK


def _check(token_ids_T: Tensor, packed: Tensor, scale_VG: Tensor, num_features: int, bits: int) -> None:
    assert bits in (4, 8), f"codes of {bits} bits"
    assert packed.dtype == torch.int32 and packed.is_contiguous(), f"packed {packed.dtype} {packed.shape}"
    assert packed.shape[1] == -(-num_features * bits // 32), f"{packed.shape[1]} words for {num_features} columns"
    assert scale_VG.is_contiguous() and scale_VG.shape[0] == packed.shape[0], f"scale {scale_VG.shape}"
    assert num_features % scale_VG.shape[1] == 0, f"{num_features} columns in {scale_VG.shape[1]} groups"
    assert token_ids_T.ndim == 1 and token_ids_T.is_contiguous(), f"token ids {token_ids_T.shape}"
