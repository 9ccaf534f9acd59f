"""Tokens to their experts and back: what stands before and after the products of experts.

A pair is one token with one of its experts: pair p = token · S + s. Pairs are sorted by expert, each expert's run padded
to whole tiles of rows, so that a tile of the product has one expert's weights:

    expert ids [T, S]   2 0 | 1 2 | 2 0                      tiles of 2 rows, P = 6 pairs, "6" is nobody
    slots               1 5 | 2 6 | 0 3 | 4 6 | . . | …      pairs in order of tokens within an expert
    expert_of_tile       0     1     2     2    -1   …       as many tiles as there can be; the rest is -1

The number of tiles is known on the device alone; the arrays have their largest size, so a CUDA graph can hold the whole.
`combine` adds a token's experts up in order of s, in float32: the same bits on every run.

Bound: launches for few tokens; bytes of the experts' outputs for many.
Shape suffixes: T tokens, S experts of a token, P pairs, E experts, N features.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 1024
COLUMNS = 1024


@triton.jit(do_not_specialize=["num_pairs", "max_tiles"])
def sort_kernel(
    expert_ids, slots, expert_of_tile, num_pairs, max_tiles,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A program: one expert. It counts all, and places its own. EXPERTS: a power of two."""
    expert = tl.program_id(0)
    count_E = tl.zeros((EXPERTS,), dtype=tl.int32)
    for start in range(0, num_pairs, CHUNK):
        pair = start + tl.arange(0, CHUNK)
        ids = tl.load(expert_ids + pair, mask=pair < num_pairs, other=0).to(tl.int32)
        count_E += tl.histogram(ids, EXPERTS, mask=pair < num_pairs)
    index_E = tl.arange(0, EXPERTS)
    tiles_E = tl.cdiv(count_E, ROWS)
    first_tile = tl.sum(tl.where(index_E < expert, tiles_E, 0))
    count = tl.sum(tl.where(index_E == expert, count_E, 0))
    num_tiles = tl.cdiv(count, ROWS)
    placed = first_tile * ROWS
    for start in range(0, num_pairs, CHUNK):
        pair = start + tl.arange(0, CHUNK)
        ids = tl.load(expert_ids + pair, mask=pair < num_pairs, other=-1).to(tl.int32)
        is_mine = ids == expert
        rank = tl.cumsum(is_mine.to(tl.int32), axis=0) - 1
        tl.store(slots + placed + rank, pair, mask=is_mine)
        placed += tl.sum(is_mine.to(tl.int32))
    padding = placed + tl.arange(0, ROWS)
    tl.store(slots + padding, num_pairs, mask=padding < (first_tile + num_tiles) * ROWS)
    for start in range(0, num_tiles, CHUNK):
        tile = start + tl.arange(0, CHUNK)
        tl.store(expert_of_tile + first_tile + tile, expert, mask=tile < num_tiles)
    if expert == tl.num_programs(0) - 1:
        for start in range(first_tile + num_tiles, max_tiles, CHUNK):
            tile = start + tl.arange(0, CHUNK)
            tl.store(expert_of_tile + tile, -1, mask=tile < max_tiles)


@triton.jit
def combine_kernel(
    out, y, weight, num_features, stride_y, stride_weight, stride_out, PAIRS: tl.constexpr, COLUMNS: tl.constexpr
):
    """A program: COLUMNS features of one token. PAIRS: experts of a token."""
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    sum_N = tl.zeros((COLUMNS,), dtype=tl.float32)
    for s in tl.static_range(PAIRS):
        of_pair = tl.load(weight + token * stride_weight + s).to(tl.float32)
        y_N = tl.load(y + (token * PAIRS + s) * stride_y + n, mask=n < num_features, other=0.0).to(tl.float32)
        sum_N += y_N * of_pair
    tl.store(out + token * stride_out + n, sum_N.to(out.dtype.element_ty), mask=n < num_features)


def max_tiles(num_pairs: int, num_experts: int, rows: int) -> int:
    """Tiles of `rows` rows that pairs can need, however they fall."""
    return min(num_pairs, num_pairs // rows + num_experts)


@torch.library.custom_op("quantkit::sort_by_expert", mutates_args=(), device_types="cuda")
def sort_by_expert(expert_TS: Tensor, num_experts: int, rows: int) -> tuple[Tensor, Tensor]:
    """Pairs by expert: slots, int32 [tiles · rows], and the expert of each tile, int32 [tiles].

    expert_TS: int32 or int64, 0 … num_experts - 1, contiguous. rows: of a tile, a power of two.
    """
    _check_sort(expert_TS, rows)
    slots, expert_of_tile = _empty_tiles(expert_TS, num_experts, rows)
    sort_kernel[(num_experts,)](
        expert_TS, slots, expert_of_tile, expert_TS.numel(), len(expert_of_tile),
        max(triton.next_power_of_2(num_experts), 16), rows, CHUNK, num_warps=8,
    )  # fmt: skip
    return slots, expert_of_tile


@sort_by_expert.register_fake
def _(expert_TS: Tensor, num_experts: int, rows: int) -> tuple[Tensor, Tensor]:
    return _empty_tiles(expert_TS, num_experts, rows)


@sort_by_expert.register_kernel("cpu")
def plain_sort(expert_TS: Tensor, num_experts: int, rows: int) -> tuple[Tensor, Tensor]:
    """`sort_by_expert` in plain torch."""
    _check_sort(expert_TS, rows)
    slots, expert_of_tile = _empty_tiles(expert_TS, num_experts, rows)
    slots.fill_(expert_TS.numel())
    expert_of_tile.fill_(-1)
    ids, tile = expert_TS.flatten(), 0
    for expert in range(num_experts):
        pairs = (ids == expert).nonzero()[:, 0].to(torch.int32)
        num_tiles = -(-len(pairs) // rows)
        slots[tile * rows : tile * rows + len(pairs)] = pairs
        expert_of_tile[tile : tile + num_tiles] = expert
        tile += num_tiles
    return slots, expert_of_tile


@torch.library.custom_op("quantkit::combine_experts", mutates_args=(), device_types="cuda")
def combine(y_PN: Tensor, weight_TS: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Σ_s weight[t, s] · y[t · S + s], in float32 and in order, [T, N] in out_dtype. y_PN: features contiguous."""
    _check_combine(y_PN, weight_TS)
    num_tokens, num_features = len(weight_TS), y_PN.shape[1]
    out_TN = torch.empty(num_tokens, num_features, dtype=out_dtype, device=y_PN.device)
    columns = min(triton.next_power_of_2(num_features), COLUMNS)
    if num_tokens > 0:
        combine_kernel[(num_tokens, triton.cdiv(num_features, columns))](
            out_TN, y_PN, weight_TS, num_features, y_PN.stride(0), weight_TS.stride(0), out_TN.stride(0),
            weight_TS.shape[1], columns, num_warps=4,
        )  # fmt: skip
    return out_TN


@combine.register_fake
def _(y_PN: Tensor, weight_TS: Tensor, out_dtype: torch.dtype) -> Tensor:
    return y_PN.new_empty(weight_TS.shape[0], y_PN.shape[1], dtype=out_dtype)


@combine.register_kernel("cpu")
def plain_combine(y_PN: Tensor, weight_TS: Tensor, out_dtype: torch.dtype) -> Tensor:
    """`combine` in plain torch."""
    _check_combine(y_PN, weight_TS)
    num_tokens, num_pairs = weight_TS.shape
    y_TSN = y_PN.view(num_tokens, num_pairs, -1).float()
    out_TN = torch.zeros(num_tokens, y_PN.shape[1], device=y_PN.device)
    for s in range(num_pairs):
        out_TN += y_TSN[:, s] * weight_TS[:, s, None].float()
    return out_TN.to(out_dtype)


def _empty_tiles(expert_TS: Tensor, num_experts: int, rows: int) -> tuple[Tensor, Tensor]:
    tiles = max_tiles(expert_TS.numel(), num_experts, rows)
    slots = expert_TS.new_empty(tiles * rows, dtype=torch.int32)
    return slots, expert_TS.new_empty(tiles, dtype=torch.int32)


def _check_sort(expert_TS: Tensor, rows: int) -> None:
    assert expert_TS.ndim == 2 and expert_TS.is_contiguous(), f"ids {tuple(expert_TS.shape)}, not contiguous"
    assert expert_TS.dtype in (torch.int32, torch.int64), f"ids of {expert_TS.dtype}"
    assert rows & (rows - 1) == 0, f"tiles of {rows} rows"


def _check_combine(y_PN: Tensor, weight_TS: Tensor) -> None:
    assert y_PN.stride(1) == 1 and weight_TS.stride(1) == 1, "features and weights have to be next to each other"
    assert len(y_PN) == weight_TS.numel(), f"{len(y_PN)} rows for {weight_TS.numel()} pairs"
