"""The largest logits of every row: the greedy token, and the top k that a sampler looks at.

    logits [B, V]   a program: one row, PART logits   ->   the best, or the best K, of each part  [B, parts, K]
                    a program: one row                ->   of those, the best                     [B, K]

Each logit and its index become one 64-bit key, so that the order is total: larger values first, of equal ones the lower
index, NaN before everything. Whatever the parts are, the result is the same.

Bound: bytes, one read of the logits. Shape suffixes: B rows, V vocab, K kept.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantkit_kernels.capability import starts_early

MAX_KEPT = 128
ARGMAX_PART, ARGMAX_WARPS = 4096, 4
TOPK_PART, TOPK_WARPS = 2048, 4
LOWEST = tl.constexpr(-(2**63))


@triton.jit
def keys_of(logits, index, is_there):
    """int64, ordered like (value, −index). NaN is larger than all."""
    value = tl.load(logits + index, mask=is_there, other=0.0).to(tl.float32) + 0.0  # −0 and 0 are equal
    bits = tl.where(value != value, float("nan"), value).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = (ordered.to(tl.int64) << 32) | (0xFFFFFFFF - index.to(tl.int64))
    return tl.where(is_there, key, LOWEST)


@triton.jit
def index_of(key):
    """The index in a key, int64."""
    return 0xFFFFFFFF - (key & 0xFFFFFFFF)


@triton.jit
def value_of(key):
    """The value in a key, float32."""
    ordered = (key >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def part_kernel(
    logits, keys, num_logits, stride_logits, KEPT: tl.constexpr, EARLY: tl.constexpr, PART: tl.constexpr
):
    """keys: int64 [B, parts, KEPT], each part's best, in order."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    index = part * PART + tl.arange(0, PART)
    key = keys_of(logits + row * stride_logits, index, index < num_logits)
    at = keys + (row * tl.num_programs(1) + part) * KEPT
    if KEPT == 1:
        tl.store(at, tl.max(key, axis=0))
    else:
        tl.store(at + tl.arange(0, KEPT), tl.topk(key, KEPT))


@triton.jit
def argmax_kernel(keys, tokens, NUM_KEYS: tl.constexpr, EARLY: tl.constexpr, BLOCK: tl.constexpr):
    """tokens: int64 [B]."""
    row = tl.program_id(0).to(tl.int64)
    number = tl.arange(0, BLOCK)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    key = tl.load(keys + row * NUM_KEYS + number, mask=number < NUM_KEYS, other=LOWEST)
    tl.store(tokens + row, index_of(tl.max(key, axis=0)))


@triton.jit
def topk_kernel(
    keys, values, tokens, num_kept, NUM_KEYS: tl.constexpr, KEPT: tl.constexpr, EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """values, tokens: [B, num_kept], in order."""
    row = tl.program_id(0).to(tl.int64)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    number = tl.arange(0, BLOCK)
    best = tl.topk(tl.load(keys + row * NUM_KEYS + number, mask=number < NUM_KEYS, other=LOWEST), KEPT)
    number = tl.arange(0, KEPT)
    tl.store(values + row * num_kept + number, value_of(best), mask=number < num_kept)
    tl.store(tokens + row * num_kept + number, index_of(best), mask=number < num_kept)


@torch.library.custom_op("quantkit::argmax", mutates_args=(), device_types="cuda")
def argmax(logits_BV: Tensor) -> Tensor:
    """Index of the largest logit of each row, the lowest of equal ones, int64 [B]. Any float dtype, rows contiguous."""
    return launch_argmax(logits_BV)


@argmax.register_fake
def _(logits_BV: Tensor) -> Tensor:
    return logits_BV.new_empty(logits_BV.shape[0], dtype=torch.int64)


@argmax.register_kernel("cpu")
def _(logits_BV: Tensor) -> Tensor:
    _check(logits_BV)
    return logits_BV.argmax(dim=1)


@torch.library.custom_op("quantkit::topk", mutates_args=(), device_types="cuda")
def topk(logits_BV: Tensor, num_kept: int) -> tuple[Tensor, Tensor]:
    """The largest logits of each row, float32 [B, num_kept], and their indices, int64: in order, ties by index.

    num_kept: at most 128 and V.
    """
    return launch_topk(logits_BV, num_kept)


@topk.register_fake
def _(logits_BV: Tensor, num_kept: int) -> tuple[Tensor, Tensor]:
    shape = (logits_BV.shape[0], num_kept)
    return logits_BV.new_empty(shape, dtype=torch.float32), logits_BV.new_empty(shape, dtype=torch.int64)


@topk.register_kernel("cpu")
def _(logits_BV: Tensor, num_kept: int) -> tuple[Tensor, Tensor]:
    _check(logits_BV, num_kept)
    values, order = logits_BV.float().sort(dim=1, descending=True, stable=True)
    return values[:, :num_kept].contiguous(), order[:, :num_kept].contiguous()


def launch_argmax(logits_BV: Tensor, *, part: int = ARGMAX_PART, num_warps: int = ARGMAX_WARPS) -> Tensor:
    """`argmax` without the operator around it."""
    _check(logits_BV)
    keys = _best_of_parts(logits_BV, 1, part, num_warps)
    tokens_B = logits_BV.new_empty(len(logits_BV), dtype=torch.int64)
    early = starts_early(logits_BV.device)
    if len(logits_BV) > 0:
        num_keys = keys.shape[1]
        argmax_kernel[(len(logits_BV),)](
            keys, tokens_B, num_keys, early, triton.next_power_of_2(num_keys), num_warps=1, launch_pdl=early
        )
    return tokens_B


def launch_topk(
    logits_BV: Tensor, num_kept: int, *, part: int = TOPK_PART, num_warps: int = TOPK_WARPS
) -> tuple[Tensor, Tensor]:
    """`topk` without the operator around it."""
    _check(logits_BV, num_kept)
    kept = max(triton.next_power_of_2(num_kept), 2)
    keys = _best_of_parts(logits_BV, kept, part, num_warps)
    values = logits_BV.new_empty(len(logits_BV), num_kept, dtype=torch.float32)
    tokens = values.new_empty(values.shape, dtype=torch.int64)
    early = starts_early(logits_BV.device)
    if len(logits_BV) > 0:
        num_keys = keys.shape[1]
        block = triton.next_power_of_2(num_keys)
        topk_kernel[(len(logits_BV),)](
            keys, values, tokens, num_kept, num_keys, kept, early, block,
            num_warps=min(max(block // 512, 1), 16), launch_pdl=early,
        )  # fmt: skip
    return values, tokens


def _best_of_parts(logits_BV: Tensor, kept: int, part: int, num_warps: int) -> Tensor:
    num_rows, num_logits = logits_BV.shape
    num_parts = triton.cdiv(num_logits, part)
    keys = logits_BV.new_empty(num_rows, num_parts * kept, dtype=torch.int64)
    early = starts_early(logits_BV.device)
    if num_rows > 0:
        part_kernel[(num_rows, num_parts)](
            logits_BV, keys, num_logits, logits_BV.stride(0), kept, early, part, num_warps=num_warps, launch_pdl=early
        )
    return keys


def _check(logits_BV: Tensor, num_kept: int = 1) -> None:
    assert logits_BV.ndim == 2 and logits_BV.stride(1) == 1, f"logits {logits_BV.shape} by {logits_BV.stride()}"
    assert 0 < num_kept <= min(MAX_KEPT, logits_BV.shape[1]), f"{num_kept} of {logits_BV.shape[1]} logits"
