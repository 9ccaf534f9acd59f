"""`choose_experts`, `sort_by_expert` and `combine` on a GPU.

Each program of the sort counts all pairs, so that it knows where its expert's tiles begin, and then places its own: no
program waits for another, and pairs stay in order. Pairs are few: 32768 for 4096 tokens with 8 experts.
Shape suffixes: T tokens, S experts of a token, P pairs, E experts, N features.
"""

import triton
import triton.language as tl
from torch import Tensor

from quantkit_kernels.triton_launch import Launcher, num_parts, power_above

CHUNK = 1024
COLUMNS = 1024


@triton.jit
def choose_kernel(
    experts, weights, scores, stride_scores,
    NUM_EXPERTS: tl.constexpr, NUM_CHOSEN: tl.constexpr, NORMALIZED: tl.constexpr, BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
):  # fmt: skip
    """A program: one token. Of equal scores the one with the smaller number is larger. BLOCK, SLOTS: powers of two."""
    token = tl.program_id(0).to(tl.int64)
    expert_X, slot_S = tl.arange(0, BLOCK), tl.arange(0, SLOTS)
    is_expert = expert_X < NUM_EXPERTS
    score_X = tl.load(scores + token * stride_scores + expert_X, mask=is_expert, other=-float("inf")).to(
        tl.float32
    )
    weight_X = tl.exp(score_X - tl.max(score_X, axis=0))
    total = tl.sum(weight_X, axis=0)
    weight_X = tl.where(is_expert, weight_X, -1.0)
    chosen_S, weight_S = tl.zeros((SLOTS,), tl.int32), tl.zeros((SLOTS,), tl.float32)
    for s in tl.static_range(NUM_CHOSEN):
        weight, expert = tl.max(weight_X, axis=0, return_indices=True)
        expert = tl.minimum(expert, NUM_EXPERTS - 1)  # where all are NaN none is the largest
        chosen_S, weight_S = tl.where(slot_S == s, expert, chosen_S), tl.where(slot_S == s, weight, weight_S)
        weight_X = tl.where(expert_X == expert, -1.0, weight_X)
    if NORMALIZED:
        total = tl.sum(weight_S, axis=0) + 0.0 * total  # NaN stays NaN
    at = token * NUM_CHOSEN + slot_S
    tl.store(experts + at, chosen_S, mask=slot_S < NUM_CHOSEN)
    tl.store(weights + at, weight_S / total, mask=slot_S < NUM_CHOSEN)


@triton.jit(do_not_specialize=["num_pairs", "max_tiles"])
def sort_kernel(
    expert_ids, slots, expert_of_tile, num_pairs, max_tiles,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A program: one expert. It counts all, and places its own. EXPERTS: a power of two."""
    expert, num_experts = tl.program_id(0), tl.num_programs(0)
    count_E = tl.zeros((EXPERTS,), dtype=tl.int32)
    for start in range(0, num_pairs, CHUNK):
        pair = start + tl.arange(0, CHUNK)
        ids = tl.load(expert_ids + pair, mask=pair < num_pairs, other=-1)
        count_E += tl.histogram(ids.to(tl.int32), EXPERTS, mask=(ids >= 0) & (ids < num_experts))
    index_E = tl.arange(0, EXPERTS)
    tiles_E = tl.cdiv(count_E, ROWS)
    first_tile = tl.sum(tl.where(index_E < expert, tiles_E, 0))
    count = tl.sum(tl.where(index_E == expert, count_E, 0))
    num_tiles = tl.cdiv(count, ROWS)
    placed = first_tile * ROWS
    for start in range(0, num_pairs, CHUNK):
        pair = start + tl.arange(0, CHUNK)
        ids = tl.load(expert_ids + pair, mask=pair < num_pairs, other=-1)
        is_mine = ids == expert
        rank = tl.cumsum(is_mine.to(tl.int32), axis=0) - 1
        tl.store(slots + placed + rank, pair, mask=is_mine)
        placed += tl.sum(is_mine.to(tl.int32))
    padding = placed + tl.arange(0, ROWS)
    tl.store(slots + padding, num_pairs, mask=padding < (first_tile + num_tiles) * ROWS)
    for start in range(0, num_tiles, CHUNK):
        tile = start + tl.arange(0, CHUNK)
        tl.store(expert_of_tile + first_tile + tile, expert, mask=tile < num_tiles)
    if expert == num_experts - 1:
        for start in range(first_tile + num_tiles, max_tiles, CHUNK):
            tile = start + tl.arange(0, CHUNK)
            tl.store(expert_of_tile + tile, -1, mask=tile < max_tiles)


@triton.jit
def combine_kernel(
    out,
    y,
    weight,
    num_features,
    stride_y,
    stride_weight,
    stride_out,
    PAIRS: tl.constexpr,
    COLUMNS: tl.constexpr,
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


_choose, _sort, _combine = Launcher(choose_kernel), Launcher(sort_kernel), Launcher(combine_kernel)


def choose(scores_TX: Tensor, normalized: bool, expert_TS: Tensor, weight_TS: Tensor) -> None:
    """Write expert_TS and weight_TS."""
    num_experts, num_chosen = scores_TX.shape[1], expert_TS.shape[1]
    arguments = (expert_TS, weight_TS, scores_TX, scores_TX.stride(0))
    constants = (num_experts, num_chosen, normalized, power_above(num_experts), power_above(num_chosen))
    _choose((len(scores_TX), 1), arguments, constants, num_warps=1, early=False)


def sort(expert_TS: Tensor, num_experts: int, slots: Tensor, expert_of_tile: Tensor) -> None:
    """Write slots and expert_of_tile."""
    rows = len(slots) // len(expert_of_tile)
    arguments = (expert_TS, slots, expert_of_tile, expert_TS.numel(), len(expert_of_tile))
    constants = (max(power_above(num_experts), 16), rows, CHUNK)
    _sort((num_experts, 1), arguments, constants, num_warps=8, early=False)


def combine(y_PN: Tensor, weight_TS: Tensor, out_TN: Tensor) -> None:
    """Write out_TN."""
    num_tokens, num_features = out_TN.shape
    columns = min(power_above(num_features), COLUMNS)
    strides = (y_PN.stride(0), weight_TS.stride(0), out_TN.stride(0))
    arguments = (out_TN, y_PN, weight_TS, num_features, *strides)
    grid = (num_tokens, num_parts(num_features, columns))
    _combine(grid, arguments, (weight_TS.shape[1], columns), num_warps=4, early=False)
