"""8-bit keys and values of a few sequences in 16 bits, for attention that reads them many times.

    pool [P, H, S, D] 8-bit, blocks anywhere      k  [B · L, H, 128, D] in the dtype of q     a sequence's blocks
                                             ──►  v  [B · L, H, 128, D] fp16                  in a row
    scales per token [P, H, S]                    records [B · L, H, 128, 4]: k, 1 / v, log2 v; what
                                                  multiplies scores is in that of k

bf16 and fp16 hold 8-bit codes exactly: attention over the result is attention over the codes, which every tile of rows
would convert anew otherwise. Slots of tokens that no query sees stay unwritten. Bound: 3 bytes an element, memory.
Shape suffixes: B sequences, L blocks of a sequence, P blocks of the pool, H heads, S slots of a block, D elements.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit_kernels.attention_tile import LOG2_E, planes
from quantkit_kernels.capability import converts_float8
from quantkit_kernels.paged_kv import KVPool, Masking, Pages
from quantkit_kernels.triton_launch import num_parts, power_above

SLOTS = 128
TOKENS = 32  # of a program
MOST_BYTES = 1 << 29  # of the result, if one sequence alone is not more


@triton.jit(do_not_specialize=("window", "stride_table"))
def widen_kernel(
    k, v, k_scale, v_scale, block_table, lengths, cu_seqlens_q, wide_k, wide_v, records, wide_table,
    softmax_scale, window, stride_block, stride_head, stride_token, stride_table,
    FORMAT: tl.constexpr, PER_TOKEN: tl.constexpr, HAS_WINDOW: tl.constexpr, CONVERTS: tl.constexpr, D: tl.constexpr,
    ELEMENTS: tl.constexpr, BLOCK_SIZE: tl.constexpr, SLOTS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens of one sequence and head. Grid (L · SLOTS / TOKENS, H, B)."""
    part, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_heads = tl.num_programs(1)
    blocks_of_one = tl.num_programs(0) * TOKENS // SLOTS
    token = part * TOKENS + tl.arange(0, TOKENS)
    length = tl.load(lengths + sequence)
    q_len = tl.load(cu_seqlens_q + sequence + 1) - tl.load(cu_seqlens_q + sequence)
    lowest = 0
    if HAS_WINDOW:
        lowest = tl.maximum(length - q_len - window + 1, 0)
    is_token = (token >= lowest) & (token < length) & (q_len > 0)
    wide_block = sequence * blocks_of_one + part * TOKENS // SLOTS
    if (head == 0) & (part * TOKENS % SLOTS == 0):
        tl.store(wide_table + wide_block, wide_block)

    block = tl.load(
        block_table + sequence.to(tl.int64) * stride_table + token // BLOCK_SIZE, mask=is_token, other=0
    )
    block, slot = block.to(tl.int64), token % BLOCK_SIZE
    wide_slot = (wide_block.to(tl.int64) * num_heads + head) * SLOTS + token % SLOTS
    element = tl.arange(0, ELEMENTS)
    is_there = is_token[:, None] & (element < D)[None, :]
    at = (block * stride_block + head.to(tl.int64) * stride_head + slot * stride_token)[:, None] + element[
        None, :
    ]
    wide_at = wide_slot[:, None] * D + element[None, :]
    k_CD = tl.load(k + at, mask=is_there, other=0)
    v_CD = tl.load(v + at, mask=is_there, other=0)
    if PER_TOKEN:
        at_scale = (block * num_heads + head) * BLOCK_SIZE + slot
        key_scale = tl.load(k_scale + at_scale, mask=is_token, other=1.0) * softmax_scale
        value_scale = tl.maximum(tl.load(v_scale + at_scale, mask=is_token, other=1.0), 1e-30)
        record = tl.join(tl.join(key_scale, 1.0 / value_scale), tl.join(tl.log2(value_scale), value_scale))
        record = tl.reshape(record, (TOKENS, 4))
        at_record = records + wide_slot[:, None] * 4 + tl.arange(0, 4)[None, :]
        tl.store(at_record, record, mask=is_token[:, None])
    tl.store(
        wide_k + wide_at, planes(k_CD, FORMAT, 1, CONVERTS)[0].to(wide_k.dtype.element_ty), mask=is_there
    )
    tl.store(wide_v + wide_at, planes(v_CD, FORMAT, 1, CONVERTS)[0], mask=is_there)


def sequences_at_once(pool: KVPool, pages: Pages) -> int:
    """As many as there is room for; one at least."""
    _, num_heads, _, head_dim = pool.k_PHSD.shape
    bytes_of_one = num_parts(pages.max_context, SLOTS) * SLOTS * num_heads * head_dim * 4
    return max(1, MOST_BYTES // max(bytes_of_one, 1))


def widen(pool: KVPool, pages: Pages, masking: Masking, k_dtype: torch.dtype) -> tuple[KVPool, Tensor]:
    """A pool of codes in 16 bits and its table of blocks, for the sequences of `pages` alone.

    With scales per token, its scales are records [B · L, H, 128, 4]; otherwise those of the pool.
    """
    k_PHSD, device = pool.k_PHSD, pool.k_PHSD.device
    _, num_heads, block_size, head_dim = k_PHSD.shape
    batch, blocks_of_one = pages.lengths_B.shape[0], num_parts(pages.max_context, SLOTS)
    assert pool.k_scale is not None and pool.v_scale is not None, "codes have scales"
    per_token = pool.k_scale.dim() == 3
    shape = (batch * blocks_of_one, num_heads, SLOTS)
    k, v = (torch.empty(*shape, head_dim, dtype=dtype, device=device) for dtype in (k_dtype, torch.float16))
    k_scale = torch.empty(*shape, 4, device=device) if per_token else pool.k_scale
    table_BL = torch.empty(batch, blocks_of_one, dtype=torch.int32, device=device)
    form = "int8" if k_PHSD.dtype == torch.int8 else "e4m3"
    converts = k_PHSD.is_cuda and (form == "int8" or converts_float8(device))
    widen_kernel[(blocks_of_one * SLOTS // TOKENS, num_heads, batch)](
        k_PHSD.view(torch.int8), pool.v_PHSD.view(torch.int8), pool.k_scale, pool.v_scale,
        pages.block_table_BL, pages.lengths_B, pages.cu_seqlens_q, k, v, k_scale, table_BL,
        masking.softmax_scale * LOG2_E, masking.window, *k_PHSD.stride()[:3], pages.block_table_BL.stride(0),
        form, per_token, masking.window > 0, converts, head_dim, power_above(head_dim), block_size, SLOTS, TOKENS,
        num_warps=4,
    )  # fmt: skip
    return KVPool(k, v, k_scale, k_scale if per_token else pool.v_scale), table_BL
