"""Tokens to their experts and back: what stands before and after the products of experts.

`choose_experts` takes the S largest of a router's scores. A pair is one token with one of its experts: pair
p = token · S + s. Pairs are sorted by expert, each run padded to whole tiles of rows, so that a tile of the product has
one expert's weights:

    expert ids [T, S]   2 0 | 1 2 | 2 0                      tiles of 2 rows, P = 6 pairs, "6" is nobody
    slots               1 5 | 2 6 | 0 3 | 4 6 | . . | …      pairs in order of tokens within an expert
    expert_of_tile       0     1     2     2    -1   …       as many tiles as there can be; the rest is -1

The number of tiles is known on the device alone; the arrays have their largest size, so a CUDA graph can hold it all.
`combine` adds a token's experts up in order of s, in float32: the same bits on every run.

Bound: launches for few tokens; bytes of the experts' outputs for many.
Shape suffixes: T tokens, S experts of a token, P pairs, E or X experts, N features.
"""

import torch
from torch import Tensor

from quantkit_kernels.operators import operator


def max_tiles(num_pairs: int, num_experts: int, rows: int) -> int:
    """Tiles of `rows` rows that pairs can need, however they fall."""
    return min(num_pairs, num_pairs // rows + num_experts)


def plain_choose(scores_TX: Tensor, num_per_token: int, normalized: bool) -> tuple[Tensor, Tensor]:
    """`choose_experts` in plain torch."""
    check_choose(scores_TX, num_per_token)
    weight_TX = torch.softmax(scores_TX, dim=1, dtype=torch.float32)
    weight_TS, expert_TS = weight_TX.topk(num_per_token, dim=1)
    if normalized:
        weight_TS = weight_TS / weight_TS.sum(dim=1, keepdim=True)
    return expert_TS.to(torch.int32), weight_TS


def plain_sort(expert_TS: Tensor, num_experts: int, rows: int) -> tuple[Tensor, Tensor]:
    """`sort_by_expert` in plain torch."""
    check_sort(expert_TS, rows)
    slots, expert_of_tile = empty_tiles(expert_TS, num_experts, rows)
    slots.fill_(expert_TS.numel())
    expert_of_tile.fill_(-1)
    ids, tile = expert_TS.flatten(), 0
    assert ((ids >= 0) & (ids < num_experts)).all(), (
        f"experts {int(ids.min())} … {int(ids.max())}, of {num_experts}"
    )
    for expert in range(num_experts):
        pairs = (ids == expert).nonzero()[:, 0].to(torch.int32)
        num_tiles = -(-len(pairs) // rows)
        slots[tile * rows : tile * rows + len(pairs)] = pairs
        expert_of_tile[tile : tile + num_tiles] = expert
        tile += num_tiles
    return slots, expert_of_tile


def plain_combine(y_PN: Tensor, weight_TS: Tensor, out_dtype: torch.dtype) -> Tensor:
    """`combine` in plain torch."""
    check_combine(y_PN, weight_TS)
    num_tokens, num_pairs = weight_TS.shape
    y_TSN = y_PN.view(num_tokens, num_pairs, y_PN.shape[1]).float()
    out_TN = torch.zeros(num_tokens, y_PN.shape[1], device=y_PN.device)
    for s in range(num_pairs):
        out_TN += y_TSN[:, s] * weight_TS[:, s, None].float()
    return out_TN.to(out_dtype)


def _fake_choice(scores_TX: Tensor, num_per_token: int, normalized: bool) -> tuple[Tensor, Tensor]:
    return empty_choice(scores_TX, num_per_token)


@operator("choose_experts", cpu=plain_choose, fake=_fake_choice)
def choose_experts(scores_TX: Tensor, num_per_token: int, normalized: bool) -> tuple[Tensor, Tensor]:
    """The experts with a token's S largest scores, int32 [T, S], largest first, and their weights, float32 [T, S].

    Weights are the softmax of all X scores, in float32; normalized: divided by the sum of those chosen. scores_TX: any
    float dtype, experts contiguous.
    """
    check_choose(scores_TX, num_per_token)
    from quantkit_kernels import moe_routing_kernel

    expert_TS, weight_TS = empty_choice(scores_TX, num_per_token)
    if len(scores_TX) > 0:
        moe_routing_kernel.choose(scores_TX, normalized, expert_TS, weight_TS)
    return expert_TS, weight_TS


def _fake_sum(y_PN: Tensor, weight_TS: Tensor, out_dtype: torch.dtype) -> Tensor:
    return y_PN.new_empty(weight_TS.shape[0], y_PN.shape[1], dtype=out_dtype)


@operator("combine_experts", cpu=plain_combine, fake=_fake_sum)
def combine(y_PN: Tensor, weight_TS: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Σ_s weight[t, s] · y[t · S + s], in float32 and in order, [T, N] in out_dtype. y_PN: features contiguous."""
    check_combine(y_PN, weight_TS)
    from quantkit_kernels import moe_routing_kernel

    out_TN = torch.empty(len(weight_TS), y_PN.shape[1], dtype=out_dtype, device=y_PN.device)
    if len(out_TN) > 0:
        moe_routing_kernel.combine(y_PN, weight_TS, out_TN)
    return out_TN


def _fake_tiles(expert_TS: Tensor, num_experts: int, rows: int) -> tuple[Tensor, Tensor]:
    return empty_tiles(expert_TS, num_experts, rows)


@operator("sort_by_expert", cpu=plain_sort, fake=_fake_tiles)
def sort_by_expert(expert_TS: Tensor, num_experts: int, rows: int) -> tuple[Tensor, Tensor]:
    """Pairs by expert: slots, int32 [tiles · rows], and the expert of each tile, int32 [tiles].

    expert_TS: int32 or int64, 0 … num_experts - 1, contiguous. rows: of a tile, a power of two. On a GPU, which would
    have to be waited for to tell, a pair with another id has no slot, so that nothing writes its row of a product.
    """
    check_sort(expert_TS, rows)
    from quantkit_kernels import moe_routing_kernel

    slots, expert_of_tile = empty_tiles(expert_TS, num_experts, rows)
    if len(expert_of_tile) > 0:
        moe_routing_kernel.sort(expert_TS, num_experts, slots, expert_of_tile)
    return slots, expert_of_tile


def empty_choice(scores_TX: Tensor, num_per_token: int) -> tuple[Tensor, Tensor]:
    shape = (len(scores_TX), num_per_token)
    return scores_TX.new_empty(shape, dtype=torch.int32), scores_TX.new_empty(shape, dtype=torch.float32)


def check_choose(scores_TX: Tensor, num_per_token: int) -> None:
    assert scores_TX.ndim == 2 and scores_TX.stride(1) == 1, (
        f"scores {tuple(scores_TX.shape)}, not contiguous"
    )
    assert 0 < num_per_token <= scores_TX.shape[1], f"{num_per_token} of {scores_TX.shape[1]} experts"


def empty_tiles(expert_TS: Tensor, num_experts: int, rows: int) -> tuple[Tensor, Tensor]:
    tiles = max_tiles(expert_TS.numel(), num_experts, rows)
    slots = expert_TS.new_empty(tiles * rows, dtype=torch.int32)
    return slots, expert_TS.new_empty(tiles, dtype=torch.int32)


def check_sort(expert_TS: Tensor, rows: int) -> None:
    assert expert_TS.ndim == 2 and expert_TS.is_contiguous(), f"ids {tuple(expert_TS.shape)}, not contiguous"
    assert expert_TS.dtype in (torch.int32, torch.int64), f"ids of {expert_TS.dtype}"
    assert rows & (rows - 1) == 0, f"tiles of {rows} rows"


def check_combine(y_PN: Tensor, weight_TS: Tensor) -> None:
    assert y_PN.stride(1) == 1 and weight_TS.stride(1) == 1, (
        "features and weights have to be next to each other"
    )
    assert len(y_PN) == weight_TS.numel(), f"{len(y_PN)} rows for {weight_TS.numel()} pairs"
