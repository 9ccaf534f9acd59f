"""`sampling` on a GPU: one read of the logits, then few of them.

    argmax   logits [B, V]   a program: one row, PART logits     the best key of each part  ->  the best of those
    top k    logits [B, V]   a program: one row, PART logits     groups [B, V / 16], the largest of 16
                             a program: one row                  tops, the largest of 16 groups
                                                                 the k best tops, of their groups the k best, of their
                                                                 logits the k best

The k best logits are in k groups at most, and those in k tops: no other can have a larger one. A logit and its index
are one 64-bit key, so that the order is total and the result does not depend on the parts.

Bound: bytes, one read of the logits.
Shape suffixes: B rows, V vocab, K kept.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantkit_kernels.capability import starts_early
from quantkit_kernels.sampling import check
from quantkit_kernels.triton_launch import Launcher, num_parts, power_above

PART, PART_WARPS = 2048, 4
TOPK_WARPS = 16
GROUP = 16
NOTHING = tl.constexpr(-(2**31))  # below −inf
NAN = tl.constexpr(0x7FC00000)


@triton.jit
def ordered_bits(logits, index, is_there):
    """int32, ordered like the logits; NaN above all, NOTHING where masked."""
    value = tl.load(logits + index, mask=is_there, other=0.0).to(tl.float32)
    return tl.where(is_there, ordered_of(value), NOTHING)


@triton.jit
def ordered_of(value):
    """int32, ordered like float32 values; NaN above all."""
    value += 0.0  # −0 and 0 are equal
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(value != value, NAN, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def key_of(ordered, index):
    """int64, ordered like (value, −index)."""
    return (ordered.to(tl.int64) << 32) | (0xFFFFFFFF - index.to(tl.int64))


@triton.jit
def index_of(key):
    """The index in a key, int64."""
    return 0xFFFFFFFF - (key & 0xFFFFFFFF)


@triton.jit
def value_of(key):
    """The value in a key, float32."""
    return float_of((key >> 32).to(tl.int32))


@triton.jit
def float_of(ordered):
    """The inverse of `ordered_of`."""
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def best_of_parts_kernel(logits, keys, num_logits, stride_logits, EARLY: tl.constexpr, PART: tl.constexpr):
    """keys: int64 [B, parts]."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    index = part * PART + tl.arange(0, PART)
    ordered = ordered_bits(logits + row * stride_logits, index, index < num_logits)
    tl.store(keys + row * tl.num_programs(1) + part, tl.max(key_of(ordered, index), axis=0))


@triton.jit
def argmax_kernel(keys, tokens, is_nan, NUM_KEYS: tl.constexpr, EARLY: tl.constexpr, BLOCK: tl.constexpr):
    """tokens: int64 [B]; is_nan: bool [B]."""
    row = tl.program_id(0).to(tl.int64)
    number = tl.arange(0, BLOCK)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    key = tl.load(keys + row * NUM_KEYS + number, mask=number < NUM_KEYS, other=-(2**63))
    best = tl.max(key, axis=0)
    tl.store(tokens + row, index_of(best))
    tl.store(is_nan + row, (best >> 32) == NAN)


@triton.jit
def best_of_groups_kernel(
    logits, groups, num_logits, num_groups, stride_logits, EARLY: tl.constexpr, PART: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """groups: int32 [B, num_groups], ordered bits."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    index = part * PART + tl.arange(0, PART)
    ordered = ordered_bits(logits + row * stride_logits, index, index < num_logits)
    best = tl.max(tl.reshape(ordered, (PART // GROUP, GROUP)), axis=1)
    group = part * (PART // GROUP) + tl.arange(0, PART // GROUP)
    tl.store(groups + row * num_groups + group, best, mask=group < num_groups)


@triton.jit
def members(parents, GROUP: tl.constexpr):
    """The indices that make up groups: int64 [K · GROUP]."""
    index = parents[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    return tl.reshape(index, (parents.shape[0] * GROUP,))


@triton.jit
def topk_kernel(
    logits, groups, values, tokens, num_logits, num_kept, stride_logits, NUM_GROUPS: tl.constexpr,
    KEPT: tl.constexpr, EARLY: tl.constexpr, TOPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """values, tokens: [B, num_kept], in order."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride_logits
    groups += row * NUM_GROUPS
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    top = tl.arange(0, TOPS)
    group = top[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    ordered = tl.load(groups + group, mask=group < NUM_GROUPS, other=NOTHING)
    best = tl.topk(key_of(tl.max(ordered, axis=1), top), KEPT)
    group = members(index_of(best), GROUP)
    ordered = tl.load(groups + group, mask=group < NUM_GROUPS, other=NOTHING)
    best = tl.topk(key_of(ordered, group), KEPT)
    index = members(index_of(best), GROUP)
    best = tl.topk(key_of(ordered_bits(logits, index, index < num_logits), index), KEPT)
    number = tl.arange(0, KEPT)
    tl.store(values + row * num_kept + number, value_of(best), mask=number < num_kept)
    tl.store(tokens + row * num_kept + number, index_of(best), mask=number < num_kept)


_best_of_parts = Launcher(best_of_parts_kernel)
_argmax = Launcher(argmax_kernel)
_best_of_groups = Launcher(best_of_groups_kernel)
_topk = Launcher(topk_kernel)


def launch_argmax(logits_BV: Tensor) -> tuple[Tensor, Tensor]:
    """`argmax` without the operator around it."""
    check(logits_BV)
    return launch_best(best_of_parts(logits_BV))


def best_of_parts(logits_BV: Tensor) -> Tensor:
    """The key of the largest logit of each part, int64 [B, parts]."""
    num_rows, num_logits = logits_BV.shape
    keys = logits_BV.new_empty(num_rows, num_parts(num_logits, PART), dtype=torch.int64)
    early = starts_early(logits_BV.device)
    if num_rows > 0:
        arguments = (logits_BV, keys, num_logits, logits_BV.stride(0))
        _best_of_parts((num_rows, keys.shape[1]), arguments, (early, PART), num_warps=PART_WARPS, early=early)
    return keys


def launch_best(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Of the keys of each row [B, parts], the index in the largest, and whether it is NaN's."""
    num_rows, parts = keys.shape
    tokens_B, is_nan_B = keys.new_empty(num_rows), keys.new_empty(num_rows, dtype=torch.bool)
    early = starts_early(keys.device)
    if num_rows > 0:
        constants = (parts, early, power_above(parts))
        _argmax((num_rows, 1), (keys, tokens_B, is_nan_B), constants, num_warps=1, early=early)
    return tokens_B, is_nan_B


def launch_topk(
    logits_BV: Tensor, num_kept: int, *, part: int = PART, num_warps: int = TOPK_WARPS
) -> tuple[Tensor, Tensor]:
    """`topk` without the operator around it."""
    check(logits_BV, num_kept)
    num_rows, num_logits = logits_BV.shape
    num_groups = num_parts(num_logits, GROUP)
    groups = logits_BV.new_empty(num_rows, num_groups, dtype=torch.int32)
    values = logits_BV.new_empty(num_rows, num_kept, dtype=torch.float32)
    tokens = groups.new_empty(num_rows, num_kept, dtype=torch.int64)
    kept = max(power_above(num_kept), 2)
    tops = max(power_above(num_parts(num_groups, GROUP)), kept)
    early = starts_early(logits_BV.device)
    if num_rows > 0:
        _best_of_groups(
            (num_rows, num_parts(num_logits, part)),
            (logits_BV, groups, num_logits, num_groups, logits_BV.stride(0)),
            (early, part, GROUP),
            num_warps=PART_WARPS,
            early=early,
        )
        _topk(
            (num_rows, 1),
            (logits_BV, groups, values, tokens, num_logits, num_kept, logits_BV.stride(0)),
            (num_groups, kept, early, tops, GROUP),
            num_warps=num_warps,
            early=early,
        )
    return values, tokens
