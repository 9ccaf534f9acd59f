"""Attention over pages behind two functions: the GPU's kernels for 16-bit queries, plain torch for all others.

    paged_decode     few new tokens in each sequence     attention_decode     | torch: keys and values gathered,
    paged_prefill    any number                          attention_prefill    | of short contexts all at once

In torch keys and values are dequantized to the dtype of the queries, each product rounded. Where scores are capped,
which torch's attention cannot do, the definition in `paged_kv` computes.

Shape suffixes: P blocks in the pool, S slots of a block, H heads of keys and values, Q query heads, L blocks of a
sequence, T new tokens, C tokens of a context, D head dimension.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from quantkit_kernels import paged_kv
from quantkit_kernels.float8 import REBIAS, decode_shifted
from quantkit_kernels.paged_kv import KVPool, Masking, Pages

TOGETHER_TOKENS = 96  # of the longest context: to gather more costs more than the calls that it saves


def paged_decode(
    q_TQD: Tensor, pool: KVPool, pages: Pages, masking: Masking, *, split_tokens: int = 0
) -> Tensor:
    """Attention of at most 16 new tokens in each sequence: [T, Q, D] in the dtype of q.

    split_tokens: parts in which a context is cut, so that a sequence's result does not depend on what else is in the
    batch; 0: as fills the device. Torch cuts nothing.
    """
    if _has_kernels(q_TQD):
        from quantkit_kernels import attention_decode

        return attention_decode.launch(q_TQD, pool, pages, masking, split_tokens)
    is_single = len(q_TQD) == len(pages.lengths_B) and not (masking.soft_cap or split_tokens)
    if is_single and _gains_together(pages.lengths_B.tolist()):
        return attend_together(q_TQD, pool, pages, masking)
    return attend(q_TQD, pool, pages, masking)


def paged_prefill(q_TQD: Tensor, pool: KVPool, pages: Pages, masking: Masking) -> Tensor:
    """Attention of any number of new tokens in each sequence: [T, Q, D] in the dtype of q."""
    if _has_kernels(q_TQD):
        from quantkit_kernels import attention_prefill

        return attention_prefill.launch(q_TQD, pool, pages, masking)
    return attend(q_TQD, pool, pages, masking)


def attend(q_TQD: Tensor, pool: KVPool, pages: Pages, masking: Masking) -> Tensor:
    """Either of them in torch. Reads the lengths back from the device."""
    if masking.soft_cap:
        return paged_kv.attend(q_TQD.float(), pool, pages, masking).to(q_TQD.dtype)
    lengths, bounds = pages.lengths_B.tolist(), pages.cu_seqlens_q.tolist()
    if len(lengths) == 1 and bounds[1] == len(q_TQD):
        return _attend_one(q_TQD, pool, pages.block_table_BL[0], lengths[0], masking)
    out_TQD = torch.zeros_like(q_TQD)  # tokens behind the last sequence are padding
    for first, last, blocks_L, length in zip(
        bounds[:-1], bounds[1:], pages.block_table_BL, lengths, strict=True
    ):
        if first < last:
            out_TQD[first:last] = _attend_one(q_TQD[first:last], pool, blocks_L, length, masking)
    return out_TQD


def attend_together(q_BQD: Tensor, pool: KVPool, pages: Pages, masking: Masking) -> Tensor:
    """One new token in each sequence, all in one call, contexts filled up to the longest: [B, Q, D].

    What fills up is zeros: what lies there is another sequence's, and may be no number.
    """
    batch, _, head_dim = q_BQD.shape
    num_heads, block_size = pool.k_PHSD.shape[1:3]
    length_B1 = pages.lengths_B[:, None]
    num_blocks = -(-int(length_B1.max()) // block_size)
    position_C = torch.arange(num_blocks * block_size, device=q_BQD.device)
    is_seen_BC = position_C < length_B1
    if masking.window:
        is_seen_BC &= position_C >= length_B1 - masking.window
    blocks = pages.block_table_BL[:, :num_blocks].reshape(-1)

    def values(codes_PHSD: Tensor, scale: Tensor | None) -> Tensor:
        every_HCD = gather(codes_PHSD, scale, blocks, 0, batch * len(position_C), q_BQD.dtype)
        each_BHCD = every_HCD.view(num_heads, batch, -1, head_dim).transpose(0, 1)
        return each_BHCD.masked_fill(~is_seen_BC[:, None, :, None], 0)

    out_BHGD = scaled_dot_product_attention(
        q_BQD.reshape(batch, num_heads, -1, head_dim),
        values(pool.k_PHSD, pool.k_scale),
        values(pool.v_PHSD, pool.v_scale),
        attn_mask=is_seen_BC[:, None, None],
        scale=masking.softmax_scale,
    )
    return out_BHGD.reshape(q_BQD.shape)


def _gains_together(lengths: list[int]) -> bool:
    """Whether contexts are short, and so alike that at most half of what is gathered only fills them up."""
    longest = max(lengths)
    return len(lengths) > 1 and longest <= TOGETHER_TOKENS and len(lengths) * longest <= 2 * sum(lengths)


def _has_kernels(q_TQD: Tensor) -> bool:
    return q_TQD.is_cuda and q_TQD.dtype != torch.float32


def _attend_one(q_TQD: Tensor, pool: KVPool, blocks_L: Tensor, length: int, masking: Masking) -> Tensor:
    """One sequence, softmax in float32 inside."""
    num_tokens, num_queries, head_dim = q_TQD.shape
    oldest = max(0, length - num_tokens - masking.window + 1) if masking.window else 0
    k_HCD = gather(pool.k_PHSD, pool.k_scale, blocks_L, oldest, length, q_TQD.dtype)
    v_HCD = gather(pool.v_PHSD, pool.v_scale, blocks_L, oldest, length, q_TQD.dtype)
    scale, num_heads = masking.softmax_scale, k_HCD.shape[0]
    if num_tokens == 1:  # one query sees everything: its heads of a group become rows of one small matmul
        grouped = q_TQD.view(1, num_heads, -1, head_dim)
        out_1HGD = scaled_dot_product_attention(grouped, k_HCD[None], v_HCD[None], scale=scale)
        return out_1HGD.reshape(q_TQD.shape)
    is_plain = length == num_tokens and not 0 < masking.window < num_tokens
    out_QTD = scaled_dot_product_attention(
        q_TQD.transpose(0, 1)[None],
        k_HCD[None],
        v_HCD[None],
        attn_mask=None
        if is_plain
        else paged_kv.visible(num_tokens, oldest, length, masking.window, q_TQD.device),
        is_causal=is_plain,
        scale=scale,
        enable_gqa=num_queries != num_heads,
    )[0]
    return out_QTD.transpose(0, 1)


def gather(
    codes_PHSD: Tensor, scale: Tensor | None, blocks_L: Tensor, first: int, last: int, dtype: torch.dtype
) -> Tensor:
    """Tokens first … last − 1 of one sequence, dequantized: [H, C, D] in `dtype`, block by block."""
    num_heads, block_size, head_dim = codes_PHSD.shape[1:]
    blocks_L = blocks_L[first // block_size : -(-last // block_size)]
    tokens = slice(first % block_size, first % block_size + last - first)
    raw = codes_PHSD.view(torch.int8) if codes_PHSD.itemsize == 1 else codes_PHSD  # float8 cannot be indexed
    codes_HCD = _side_by_side(raw, blocks_L).reshape(num_heads, -1, head_dim)[:, tokens]
    if scale is None:
        return codes_HCD
    values_HCD = codes_HCD.to(dtype)
    if codes_PHSD.dtype == torch.float8_e4m3fn:
        values_HCD = (decode_shifted(codes_HCD.view(codes_PHSD.dtype)) * REBIAS).to(dtype)
    if scale.ndim == 1:
        return values_HCD * scale.to(dtype)[:, None, None]
    scale_HC = _side_by_side(scale, blocks_L).reshape(num_heads, -1)[:, tokens]
    return values_HCD * scale_HC.to(dtype)[:, :, None]


def _side_by_side(page_PHS: Tensor, blocks_L: Tensor) -> Tensor:
    """Blocks of every head, [H, L, S, …]; one block is not copied."""
    if blocks_L.shape[0] == 1:
        return page_PHS[int(blocks_L)].unsqueeze(1)
    return page_PHS.index_select(0, blocks_L).transpose(0, 1)  # selected first: else the whole pool is copied
