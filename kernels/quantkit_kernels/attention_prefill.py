"""Attention of many new tokens per sequence (prefill, a chunk at a time) over paged keys and values.

    grid (tile of rows, head of keys, sequence), the last tiles first: they see most

    tokens of the context   |  prefix, seen by every row: no mask  |  diagonal: masked  |
    with a window           |  masked  |  seen by every row  |  masked  |

A tile's rows are all query heads that share the head of keys, token by token; K and V of prefix and chunk alike come
from the pages. 8-bit ones are made 16 bits wide first (`attention_widen`), once for all tiles.
Bound: 4 · D operations for each query head, new token and token it sees: tensor cores.
Shape suffixes: T new tokens, Q query heads, H heads of keys, D head dimension, B sequences.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit_kernels import attention_widen, paged_kv
from quantkit_kernels.attention_tile import (
    LOG2_E,
    NOTHING,
    attend,
    constants,
    interleave,
    load_queries,
    stored,
    zeros,
)
from quantkit_kernels.operators import on_its_device
from quantkit_kernels.paged_kv import EIGHT_BIT, KVPool, Masking, Pages


@triton.jit(do_not_specialize=("window", "stride_table"))
def prefill_kernel(
    q, k, v, k_scale, v_scale, block_table, lengths, cu_seqlens_q, out,
    softmax_scale, window, soft_cap,
    stride_q, stride_query, stride_block, stride_head, stride_token, stride_table,
    GROUP: tl.constexpr, ROWS: tl.constexpr, FORMAT: tl.constexpr, HAS_SCALE: tl.constexpr, PER_TOKEN: tl.constexpr,
    NORMALISE: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, CONVERTS: tl.constexpr,
    IS_WIDE: tl.constexpr, D: tl.constexpr, WORDS: tl.constexpr, PLANES: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Strides of q in elements, of k and v (alike) in stored elements."""
    row_tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head, num_heads = tl.program_id(1), tl.num_programs(1)
    sequence = tl.program_id(2)
    length = tl.load(lengths + sequence)
    q_first = tl.load(cu_seqlens_q + sequence)
    q_len = tl.load(cu_seqlens_q + sequence + 1) - q_first
    if row_tile * ROWS >= q_len * GROUP:
        return

    row = row_tile * ROWS + tl.arange(0, ROWS)
    new_token, query = row // GROUP, head * GROUP + row % GROUP
    is_row = new_token < q_len
    position = tl.where(is_row, length - q_len + new_token, -1)
    at_q = q + (q_first + new_token).to(tl.int64) * stride_q + query * stride_query
    DTYPE: tl.constexpr = k.dtype.element_ty if FORMAT == "16-bit" else tl.float16
    planes_of_q, factor = load_queries(at_q, is_row, DTYPE, NORMALISE, D, WORDS, PLANES)
    row_scale = factor * softmax_scale
    if HAS_SCALE and not PER_TOKEN:
        row_scale *= tl.load(k_scale + head)
        value_scale = tl.load(v_scale + head)
    else:
        value_scale = 1.0

    k += head.to(tl.int64) * stride_head
    v += head.to(tl.int64) * stride_head
    k_scale += head * BLOCK_SIZE * (4 if IS_WIDE else 1)
    v_scale += head * BLOCK_SIZE
    block_table += sequence.to(tl.int64) * stride_table
    scale_block = num_heads * BLOCK_SIZE
    first_position = length - q_len + row_tile * ROWS // GROUP
    last_position = tl.minimum(length - q_len + (row_tile * ROWS + ROWS - 1) // GROUP, length - 1)
    lowest = 0
    acc = zeros(ROWS, WORDS, PLANES)
    m = tl.full((ROWS,), NOTHING, dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    first = 0
    seen_by_all = tl.maximum(first_position + 1, 0) // TILE * TILE
    if HAS_WINDOW:
        lowest = tl.maximum(first_position - window + 1, 0)
        first = lowest // TILE * TILE
        until = tl.minimum(tl.cdiv(tl.maximum(last_position - window + 1, 0), TILE) * TILE, last_position + 1)
        acc, m, total = attend(
            planes_of_q, row_scale, position, acc, m, total, first, lowest, until,
            k, v, k_scale, v_scale, block_table, stride_block, stride_token, scale_block, window, soft_cap,
            FORMAT, PER_TOKEN, IS_WIDE, HAS_WINDOW, HAS_CAP, True, CONVERTS, D, WORDS, PLANES, BLOCK_SIZE, TILE, STAGES,
        )  # fmt: skip
        first = tl.cdiv(until, TILE) * TILE
        seen_by_all = tl.maximum(seen_by_all, first)
    acc, m, total = attend(
        planes_of_q, row_scale, position, acc, m, total, first, lowest, seen_by_all,
        k, v, k_scale, v_scale, block_table, stride_block, stride_token, scale_block, window, soft_cap,
        FORMAT, PER_TOKEN, IS_WIDE, HAS_WINDOW, HAS_CAP, False, CONVERTS, D, WORDS, PLANES, BLOCK_SIZE, TILE, STAGES,
    )  # fmt: skip
    acc, m, total = attend(
        planes_of_q, row_scale, position, acc, m, total, seen_by_all, lowest, last_position + 1,
        k, v, k_scale, v_scale, block_table, stride_block, stride_token, scale_block, window, soft_cap,
        FORMAT, PER_TOKEN, IS_WIDE, HAS_WINDOW, HAS_CAP, True, CONVERTS, D, WORDS, PLANES, BLOCK_SIZE, TILE, STAGES,
    )  # fmt: skip

    result = interleave(acc, PLANES) / tl.where(total > 0, total, 1.0)[:, None] * value_scale
    element = tl.arange(0, WORDS * PLANES)
    at_row = (q_first + new_token).to(tl.int64) * (num_heads * GROUP) + query
    is_there = is_row[:, None] & (element < D)[None, :]
    tl.store(out + at_row[:, None] * D + element[None, :], result.to(out.dtype.element_ty), mask=is_there)


def program_shape(head_dim: int) -> tuple[int, int, int, int]:
    """Rows and tokens of a tile, warps, pipeline stages."""
    return (128, 64, 8, 3) if head_dim <= 128 else (64, 32, 4, 2)


@on_its_device
def launch(
    q_TQD: Tensor,
    pool: KVPool,
    pages: Pages,
    masking: Masking,
    *,
    shape: tuple[int, int, int, int] | None = None,
) -> Tensor:
    """`paged_prefill` without the operator around it. shape: another one than `program_shape` says."""
    paged_kv.check(q_TQD, pool, pages)
    out_TQD = torch.empty(q_TQD.shape, dtype=q_TQD.dtype, device=q_TQD.device)
    if pool.k_PHSD.dtype not in EIGHT_BIT:
        _launch(q_TQD, pool, pages, masking, out_TQD, shape)
        return out_TQD
    at_once = attention_widen.sequences_at_once(pool, pages)
    for first in range(0, pages.lengths_B.shape[0], at_once):
        some = slice(first, first + at_once)
        lengths_B, offsets = pages.lengths_B[some], pages.cu_seqlens_q[first : first + at_once + 1]
        part = Pages(pages.block_table_BL[some], lengths_B, offsets, pages.max_q_len, pages.max_context)
        wide, table_BL = attention_widen.widen(pool, part, masking, q_TQD.dtype)
        _launch(q_TQD, wide, part._replace(block_table_BL=table_BL), masking, out_TQD, shape)
    return out_TQD


def _launch(
    q_TQD: Tensor,
    pool: KVPool,
    pages: Pages,
    masking: Masking,
    out_TQD: Tensor,
    shape: tuple[int, int, int, int] | None,
) -> None:
    """Of keys and values in 16 bits."""
    num_heads, block_size, head_dim = pool.k_PHSD.shape[1:]
    batch, group = pages.lengths_B.shape[0], q_TQD.shape[1] // num_heads
    rows, tile, num_warps, stages = shape or program_shape(head_dim)
    k, v, words, planes = stored(pool, as_words=False)
    k_scale, v_scale = (v if scale is None else scale for scale in (pool.k_scale, pool.v_scale))
    has_records = pool.k_scale is not None and pool.k_scale.dim() > 1
    prefill_kernel[(triton.cdiv(pages.max_q_len * group, rows), num_heads, batch)](
        q_TQD, k, v, k_scale, v_scale, pages.block_table_BL, pages.lengths_B, pages.cu_seqlens_q, out_TQD,
        masking.softmax_scale * LOG2_E, masking.window, masking.soft_cap * LOG2_E,
        q_TQD.stride(0), q_TQD.stride(1), *k.stride()[:3], pages.block_table_BL.stride(0),
        group, rows, *constants(q_TQD, pool, masking), has_records, head_dim, words, planes, block_size, tile, stages,
        num_warps=num_warps,
    )  # fmt: skip
