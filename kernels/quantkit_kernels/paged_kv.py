"""Keys and values in pages: where they lie, how attention finds them, and attention over them in plain torch.

    pool of one layer                                              pages of one step, the same for every layer

    k, v      [P, H, S, D]   bf16, fp16, float8_e4m3fn, int8       block_table   int32 [B, L]  block of tokens S·l …
    k_scale,  none           16-bit elements                       lengths       int32 [B]     tokens, new ones too
    v_scale   [H]            float32, one per head                 cu_seqlens_q  int32 [B + 1]  sums of new tokens
              [P, H, S]      float32, one per token and head

    token c of sequence b, head h:   k[block_table[b, c // S], h, c % S]  · its scale

    block      head 0: S · D contiguous elements | head 1 | …      one sequence and head reads S · D · bytes at a time

Scales have arrays of their own, so that codes stay aligned and a page of codes is read whole. The new tokens of
sequence b, rows cu_seqlens_q[b] … cu_seqlens_q[b + 1] of the queries, are its last ones and are in the pages already:
attention sees what was stored of them, quantized like everything before. Entries of the table past a sequence's length,
slots past its end and (with a window) everything before the window are never read; they may hold anything.

Shape suffixes: P blocks in the pool, S slots of a block, H heads of keys and values, Q heads of queries, B sequences,
L blocks of a sequence, T new tokens of all sequences, C tokens of a context, D head dimension.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK_SIZE = (
    16  # tokens of a block unless the caller has a reason; the kernels take any power of two from 16 up
)
EIGHT_BIT = (torch.float8_e4m3fn, torch.int8)
SIXTEEN_BIT = (torch.bfloat16, torch.float16)


class KVPool(NamedTuple):
    """Keys and values of one layer. Scales are None for 16-bit elements and float32 for codes (see the drawing)."""

    k_PHSD: Tensor
    v_PHSD: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None


class Pages(NamedTuple):
    """Which blocks the sequences of one step have. Tensors stay on the device; the two limits size the grid.

    max_q_len, max_context: no sequence has more new tokens, or more tokens; looser ones cost a little time only.
    """

    block_table_BL: Tensor
    lengths_B: Tensor
    cu_seqlens_q: Tensor
    max_q_len: int
    max_context: int


class Masking(NamedTuple):
    """What a query sees: keys up to its own position, and how scores are shaped before the softmax.

    softmax_scale: multiplies q · k. window: only the last `window` keys, its own included; 0 is all of them.
    soft_cap: scores become soft_cap · tanh(score / soft_cap); 0 leaves them.
    """

    softmax_scale: float
    window: int = 0
    soft_cap: float = 0.0


def create_pool(
    num_blocks: int,
    num_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    *,
    scale_shape: tuple[int, ...] | None = None,
    block_size: int = BLOCK_SIZE,
    device: torch.device | str = "cpu",
) -> KVPool:
    """A pool of zeros. scale_shape: that of k_scale and v_scale, which start as ones; None for 16-bit elements."""
    shape = (num_blocks, num_heads, block_size, head_dim)
    codes = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)]
    if scale_shape is None:
        return KVPool(*codes)
    return KVPool(*codes, *(torch.ones(scale_shape, device=device) for _ in range(2)))


def check(q_TQD: Tensor, pool: KVPool, pages: Pages) -> None:
    """Everything that can be checked without reading from the device."""
    num_blocks, num_heads, block_size, head_dim = pool.k_PHSD.shape
    dtype = pool.k_PHSD.dtype
    assert pool.v_PHSD.shape == pool.k_PHSD.shape, f"k {pool.k_PHSD.shape}, v {pool.v_PHSD.shape}"
    assert pool.v_PHSD.stride() == pool.k_PHSD.stride(), "k and v are laid out alike"
    assert pool.v_PHSD.dtype == dtype and dtype in SIXTEEN_BIT + EIGHT_BIT, f"keys of {dtype}"
    assert block_size >= 16 and block_size & (block_size - 1) == 0, f"blocks of {block_size} tokens"
    assert q_TQD.dim() == 3 and q_TQD.shape[2] == head_dim, f"queries {q_TQD.shape}, heads of {head_dim}"
    assert q_TQD.dtype in SIXTEEN_BIT, f"queries of {q_TQD.dtype}"
    assert q_TQD.shape[1] % num_heads == 0, f"{q_TQD.shape[1]} query heads share {num_heads} heads"
    assert q_TQD.stride(2) == 1 and pool.k_PHSD.stride(3) == 1, (
        "elements of a head have to be next to each other"
    )
    per_token = (num_blocks, num_heads, block_size)
    for scale in (pool.k_scale, pool.v_scale):
        if dtype in SIXTEEN_BIT:
            assert scale is None, f"scales beside {dtype}"
            continue
        assert scale is not None and scale.dtype == torch.float32, "8-bit codes have float32 scales"
        assert scale.shape in ((num_heads,), per_token), (
            f"scales {scale.shape} for a pool {pool.k_PHSD.shape}"
        )
        assert scale.is_contiguous(), "scales are contiguous"
    if pool.k_scale is not None and pool.v_scale is not None:
        assert pool.k_scale.shape == pool.v_scale.shape, "k and v have scales of one kind"
    batch = pages.lengths_B.shape[0]
    assert pages.block_table_BL.shape[0] == batch, f"{pages.block_table_BL.shape[0]} tables, {batch} lengths"
    assert pages.cu_seqlens_q.shape == (batch + 1,), (
        f"cu_seqlens_q {pages.cu_seqlens_q.shape} for {batch} sequences"
    )
    for tensor in (pages.block_table_BL, pages.lengths_B, pages.cu_seqlens_q):
        assert tensor.dtype == torch.int32, f"{tensor.dtype}: tables, lengths and offsets are int32"
    assert pages.block_table_BL.stride(1) == 1, "the blocks of a sequence have to be next to each other"


def gather(
    codes_PHSD: Tensor, scale: Tensor | None, blocks_L: Tensor, first: int, last: int, dtype: torch.dtype
) -> Tensor:
    """Tokens first … last − 1 of one sequence, dequantized: [H, C, D] in `dtype`."""
    block_size = codes_PHSD.shape[2]
    token_C = torch.arange(first, last, device=codes_PHSD.device)
    block_C, slot_C = blocks_L[token_C // block_size].long(), token_C % block_size
    x_CHD = codes_PHSD[block_C, :, slot_C].to(dtype)
    if scale is not None:
        per_head = scale if scale.dim() == 1 else scale[block_C, :, slot_C]
        x_CHD = x_CHD * per_head.to(dtype).unsqueeze(-1)
    return x_CHD.transpose(0, 1)


def attend(q_TQD: Tensor, pool: KVPool, pages: Pages, masking: Masking) -> Tensor:
    """Attention in torch, sequence by sequence, in the dtype of q: [T, Q, D]. What the kernels are tested against.

    A row that sees no key is zero. Reads the lengths back from the device.
    """
    out_TQD = torch.zeros(q_TQD.shape, dtype=q_TQD.dtype, device=q_TQD.device)
    bounds = pages.cu_seqlens_q.tolist()
    for sequence, length in enumerate(pages.lengths_B.tolist()):
        rows = slice(bounds[sequence], bounds[sequence + 1])
        if rows.stop > rows.start and length > 0:
            blocks_L = pages.block_table_BL[sequence]
            out_TQD[rows] = _attend_one(q_TQD[rows], pool, blocks_L, length, masking)
    return out_TQD


def attend_flat(q_TQD: Tensor, *fields: Any) -> Tensor:
    """`attend` in float32 for an operator, which has the fields of pool, pages and masking side by side."""
    pool, pages, masking = KVPool(*fields[:4]), Pages(*fields[4:9]), Masking(*fields[9:])
    check(q_TQD, pool, pages)
    return attend(q_TQD.float(), pool, pages, masking).to(q_TQD.dtype)


def _attend_one(q_TQD: Tensor, pool: KVPool, blocks_L: Tensor, length: int, masking: Masking) -> Tensor:
    num_tokens, num_queries, head_dim = q_TQD.shape
    num_heads = pool.k_PHSD.shape[1]
    first = max(0, length - num_tokens - masking.window + 1) if masking.window else 0
    k_HCD = gather(pool.k_PHSD, pool.k_scale, blocks_L, first, length, q_TQD.dtype)
    v_HCD = gather(pool.v_PHSD, pool.v_scale, blocks_L, first, length, q_TQD.dtype)
    q_HRD = q_TQD.transpose(0, 1).reshape(
        num_heads, -1, head_dim
    )  # rows: query heads of the head, tokens of these
    score = (q_HRD @ k_HCD.mT) * masking.softmax_scale
    if masking.soft_cap:
        score = masking.soft_cap * torch.tanh(score / masking.soft_cap)
    is_seen_TC = visible(num_tokens, first, length, masking.window, q_TQD.device)
    score = score.reshape(num_heads, -1, num_tokens, length - first).masked_fill(~is_seen_TC, -torch.inf)
    probability = torch.softmax(score, dim=-1).masked_fill(~is_seen_TC.any(dim=1, keepdim=True), 0.0)
    out_QTD = (probability.flatten(1, 2) @ v_HCD).reshape(num_queries, num_tokens, head_dim)
    return out_QTD.transpose(0, 1)


def visible(num_tokens: int, first: int, length: int, window: int, device: torch.device) -> Tensor:
    """Which of the tokens first … length − 1 each of the last num_tokens sees: bool [T, C]."""
    position_T = torch.arange(length - num_tokens, length, device=device).unsqueeze(1)
    token_C = torch.arange(first, length, device=device)
    is_seen_TC = token_C <= position_T
    return is_seen_TC & (token_C > position_T - window) if window else is_seen_TC
