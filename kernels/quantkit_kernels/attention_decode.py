"""Attention of a few new tokens per sequence (decode, speculation) over paged keys and values, split along the context.

    grid (head of keys, split × row tile, sequence)

    context of a sequence   |  split 0  |  split 1  |  split 2  |      each: softmax over its tokens alone
                                  ↓           ↓           ↓
    partial [B, max_q_len, Q, splits, D], lse [B, max_q_len, Q, splits], float32
                                  ↓
    second kernel, splits in order: out = Σ 2^(lse − max) · partial / Σ 2^(lse − max)

All query heads of a head of keys and all new tokens of a sequence are rows of one tile, so the pages are read once.
How many splits there are follows from shapes alone (`cut`); where they lie follows from the lengths, which stay
on the device: every sequence is cut into equal parts of whole tiles, and programs past the last part leave at once.
With `split_tokens` parts have that many tokens, and tiles 16 rows, whatever else is in the batch: a sequence alone and
in company gives the same bits.

Bound: 2 · D · bytes (+ 8 with scales per token) for each token and head: memory.
Shape suffixes: T new tokens, Q query heads, H heads of keys, D head dimension, B sequences.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantkit_kernels import attention_few, paged_kv
from quantkit_kernels.attention_tile import (
    LOG2_E,
    NOTHING,
    WARPGROUP_ROWS,
    attend,
    constants,
    interleave,
    load_queries,
    stored,
    zeros,
)
from quantkit_kernels.capability import num_multiprocessors, starts_early
from quantkit_kernels.operators import on_its_device
from quantkit_kernels.paged_kv import EIGHT_BIT, KVPool, Masking, Pages

MAX_Q_LEN = 16
SPLITS_AT_ONCE = 16  # partial results that the second kernel holds; fixed, so that sums have one order
PROGRAMS_PER_PROCESSOR = 2
LONGEST_SPLIT = 2048  # tokens, in batches that fill the device without splits
INVARIANT_SPLIT = (
    1024  # for `split_tokens`, where results are not to depend on the batch: whole tiles of any shape
)
MOST_PROGRAMS = 16384  # one that finds nothing to do still takes 3 ns of the device
UNSPECIALISED = ("max_q_len", "num_splits", "tiles_of_split", "window", "stride_table")  # one binary for all


@triton.jit
def _split(
    length, q_len, window, split, num_splits, tiles_of_split, HAS_WINDOW: tl.constexpr, TILE: tl.constexpr
):
    """First and last token of a split, the first token that any row sees, and how many splits are not empty."""
    lowest = 0
    if HAS_WINDOW:
        lowest = tl.maximum(length - q_len - window + 1, 0)
    first = lowest // TILE * TILE
    num_tiles = tl.cdiv(length - first, TILE)
    tiles = tl.maximum(tl.cdiv(num_tiles, num_splits), tiles_of_split)
    start = first + split * tiles * TILE
    return start, tl.minimum(start + tiles * TILE, length), lowest, tl.cdiv(num_tiles, tiles)


@triton.jit(do_not_specialize=UNSPECIALISED)
def decode_kernel(
    q, k, v, k_scale, v_scale, block_table, lengths, cu_seqlens_q, out, partial, lse,
    max_q_len, num_splits, tiles_of_split, softmax_scale, window, soft_cap,
    stride_q, stride_query, stride_block, stride_head, stride_token, stride_table,
    GROUP: tl.constexpr, ROWS: tl.constexpr, ROW_TILES: tl.constexpr, FORMAT: tl.constexpr, HAS_SCALE: tl.constexpr,
    PER_TOKEN: tl.constexpr, NORMALISE: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr,
    CONVERTS: tl.constexpr, IS_WHOLE: tl.constexpr, D: tl.constexpr, WORDS: tl.constexpr, PLANES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """IS_WHOLE: one split, which writes `out`; otherwise `partial`, `lse`. Strides of q in elements, of k in words."""
    head, sequence = tl.program_id(0), tl.program_id(2)
    row_tile, split = tl.program_id(1) % ROW_TILES, tl.program_id(1) // ROW_TILES
    num_heads = tl.num_programs(0)
    if OVERLAPS:
        gdc_wait()
        gdc_launch_dependents()
    length = tl.load(lengths + sequence)
    q_first = tl.load(cu_seqlens_q + sequence)
    q_len = tl.load(cu_seqlens_q + sequence + 1) - q_first
    start, stop, lowest, _ = _split(
        length, q_len, window, split, num_splits, tiles_of_split, HAS_WINDOW, TILE
    )
    if row_tile * ROWS >= q_len * GROUP:
        return
    if (not IS_WHOLE) and start >= stop:
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

    scale_block = num_heads * BLOCK_SIZE
    acc, m, total = attend(
        planes_of_q, row_scale, position, zeros(ROWS, WORDS, PLANES),
        tl.full((ROWS,), NOTHING, dtype=tl.float32), tl.zeros((ROWS,), dtype=tl.float32), start, lowest, stop,
        k + head.to(tl.int64) * stride_head, v + head.to(tl.int64) * stride_head,
        k_scale + head * BLOCK_SIZE, v_scale + head * BLOCK_SIZE, block_table + sequence.to(tl.int64) * stride_table,
        stride_block, stride_token, scale_block, window, soft_cap,
        FORMAT, PER_TOKEN, False, HAS_WINDOW, HAS_CAP, True, CONVERTS, D, WORDS, PLANES, BLOCK_SIZE, TILE, STAGES,
    )  # fmt: skip
    result = interleave(acc, PLANES) / tl.where(total > 0, total, 1.0)[:, None] * value_scale
    element = tl.arange(0, WORDS * PLANES)
    is_there = is_row[:, None] & (element < D)[None, :]
    if IS_WHOLE:
        at_row = (q_first + new_token).to(tl.int64) * (num_heads * GROUP) + query
        tl.store(out + at_row[:, None] * D + element[None, :], result.to(out.dtype.element_ty), mask=is_there)
    else:
        at_row = (sequence.to(tl.int64) * max_q_len + new_token) * (num_heads * GROUP) + query
        at_row = at_row * num_splits + split
        tl.store(partial + at_row[:, None] * D + element[None, :], result, mask=is_there)
        tl.store(lse + at_row, tl.where(total > 0, m + tl.log2(total), -float("inf")), mask=is_row)


@triton.jit(do_not_specialize=UNSPECIALISED)
def combine_kernel(
    partial, lse, lengths, cu_seqlens_q, out, num_splits, tiles_of_split, window,
    HAS_WINDOW: tl.constexpr, D: tl.constexpr, ELEMENTS: tl.constexpr, TILE: tl.constexpr, AT_ONCE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """One new token and query head, over the splits that are not empty. Grid (Q, max_q_len, B)."""
    query, new_token, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + sequence)
    q_first = tl.load(cu_seqlens_q + sequence)
    q_len = tl.load(cu_seqlens_q + sequence + 1) - q_first
    _, _, _, used = _split(length, q_len, window, 0, num_splits, tiles_of_split, HAS_WINDOW, TILE)
    at_row = (sequence.to(tl.int64) * tl.num_programs(1) + new_token) * tl.num_programs(0) + query
    element = tl.arange(0, ELEMENTS)
    acc = tl.zeros((ELEMENTS,), dtype=tl.float32)
    m, total = NOTHING, 0.0
    if OVERLAPS:
        gdc_wait()
    if new_token >= q_len:
        return
    for begin in range(0, used, AT_ONCE):
        split = begin + tl.arange(0, AT_ONCE)
        is_used = split < used
        at = at_row * num_splits + split
        lse_s = tl.load(lse + at, mask=is_used, other=-float("inf"))
        is_there = is_used[:, None] & (element < D)[None, :]
        part = tl.load(partial + at[:, None] * D + element[None, :], mask=is_there, other=0.0)
        next_m = tl.maximum(m, tl.max(lse_s, axis=0))
        weight = tl.exp2(lse_s - next_m)
        shrink = tl.exp2(m - next_m)
        acc = acc * shrink + tl.sum(part * weight[:, None], axis=0)
        total = total * shrink + tl.sum(weight, axis=0)
        m = next_m
    result = acc / tl.where(total > 0, total, 1.0)
    at_out = (q_first + new_token).to(tl.int64) * tl.num_programs(0) + query
    tl.store(out + at_out * D + element, result.to(out.dtype.element_ty), mask=element < D)


def cut(batch: int, num_heads: int, max_context: int, processors: int, tile: int) -> tuple[int, int]:
    """Into how many splits a context is cut at most, and the tiles of the shortest; known without the lengths.

    Two programs for each multiprocessor read at full speed. More splits than that only keep one long sequence from
    outlasting a batch of short ones; these stay whole, because short splits cost more than they gain in a full batch.
    """
    programs = batch * num_heads
    shortest = min(max(128, 8 * programs), 1024)
    wanted = max(round(PROGRAMS_PER_PROCESSOR * processors / programs), max_context // LONGEST_SPLIT)
    num_splits = min(wanted, max_context // shortest, MOST_PROGRAMS // programs)
    return max(1, num_splits), max(shortest // tile, 1)


def program_shape(num_rows: int, head_dim: int, *, is_8_bit: bool) -> tuple[int, int, int, int]:
    """Rows and tokens of a tile, warps, pipeline stages.

    In tiles of 32 rows two warps would convert the same codes: two tiles of 16, whose second reads from the L2 cache,
    take three quarters of the time. From 64 rows on the warpgroup's MMA makes up for sharing codes in 16 bits.
    """
    tokens = 64 if head_dim <= 128 else 32
    if is_8_bit:
        return 16 if num_rows <= 32 else 64, tokens, 4, 3
    return min(64, max(16, triton.next_power_of_2(num_rows))), tokens, 4, 3


@on_its_device
def launch(
    q_TQD: Tensor,
    pool: KVPool,
    pages: Pages,
    masking: Masking,
    split_tokens: int = 0,
    *,
    shape: tuple[int, int, int, int] | None = None,
    splits: int | None = None,
    one_launch: bool | None = None,
) -> Tensor:
    """`paged_decode` without the operator around it.

    shape, splits, one_launch: others than `program_shape`, `cut`, `attention_few.pays` say.
    """
    paged_kv.check(q_TQD, pool, pages)
    assert 1 <= pages.max_q_len <= MAX_Q_LEN, f"{pages.max_q_len} new tokens in a sequence"
    num_heads, processors = pool.k_PHSD.shape[1], num_multiprocessors(q_TQD.device)
    num_rows = pages.max_q_len * (q_TQD.shape[1] // num_heads)
    if one_launch is None and not (split_tokens or shape or splits):
        one_launch = attention_few.takes(q_TQD, pool, num_rows) and attention_few.pays(
            pool, pages, processors
        )
    if one_launch:
        return attention_few.launch(q_TQD, pool, pages, masking)
    num_queries, head_dim = q_TQD.shape[1:]
    batch, group = pages.lengths_B.shape[0], num_queries // num_heads
    is_8_bit = pool.k_PHSD.dtype in EIGHT_BIT
    shaped_for = 1 if split_tokens else num_rows
    rows, tile, num_warps, stages = shape or program_shape(shaped_for, head_dim, is_8_bit=is_8_bit)
    row_tiles = triton.cdiv(num_rows, rows)
    k, v, words, planes = stored(pool, as_words=rows < WARPGROUP_ROWS.value)
    assert split_tokens % tile == 0, f"parts of {split_tokens} tokens are not whole tiles of {tile}"
    num_splits, tiles_of_split = cut(batch, num_heads, pages.max_context, processors, tile)
    if split_tokens:
        num_splits, tiles_of_split = triton.cdiv(pages.max_context, split_tokens), split_tokens // tile
    elif splits is not None:
        num_splits, tiles_of_split = splits, 1

    out_TQD = torch.empty(q_TQD.shape, dtype=q_TQD.dtype, device=q_TQD.device)
    partial = lse = out_TQD
    if num_splits > 1:
        rows_and_splits = (batch, pages.max_q_len, num_queries, num_splits)
        partial = torch.empty(*rows_and_splits, head_dim, dtype=torch.float32, device=q_TQD.device)
        lse = torch.empty(rows_and_splits, dtype=torch.float32, device=q_TQD.device)
    overlaps = starts_early(q_TQD.device)
    how = {"num_warps": num_warps} | ({"launch_pdl": True} if overlaps else {})
    decode_kernel[(num_heads, num_splits * row_tiles, batch)](
        q_TQD, k, v, k if pool.k_scale is None else pool.k_scale, v if pool.v_scale is None else pool.v_scale,
        pages.block_table_BL, pages.lengths_B, pages.cu_seqlens_q, out_TQD, partial, lse,
        pages.max_q_len, num_splits, tiles_of_split,
        masking.softmax_scale * LOG2_E, masking.window, masking.soft_cap * LOG2_E,
        q_TQD.stride(0), q_TQD.stride(1), *k.stride()[:3], pages.block_table_BL.stride(0),
        group, rows, row_tiles, *constants(q_TQD, pool, masking), num_splits == 1, head_dim, words, planes,
        pool.k_PHSD.shape[2], tile, stages, overlaps, **how,
    )  # fmt: skip
    if num_splits > 1:
        combine_kernel[(num_queries, pages.max_q_len, batch)](
            partial, lse, pages.lengths_B, pages.cu_seqlens_q, out_TQD, num_splits, tiles_of_split, masking.window,
            masking.window > 0, head_dim, triton.next_power_of_2(head_dim), tile, SPLITS_AT_ONCE, overlaps, **how,
        )  # fmt: skip
    return out_TQD
