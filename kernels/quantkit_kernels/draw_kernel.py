"""`draw` on a GPU: no row is sorted, nothing waits for the host, and how a row is split does not depend on the others.

    best of parts   logits [B, V]     the largest logit of each part                       (sampling_kernel)
    filters         logits [B, V]     the cut of each row, if any row asks for it          (filter_kernel)
    draw            logits [B, V]     of each part, the least of noise / probability among those kept
    argmax          keys [B, parts]   the least of those                                   (sampling_kernel)

Bound: bytes, two reads of the logits without filters; and the integer units, ten rounds of Philox for four tokens.
Shape suffixes: B rows, V vocab.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantkit_kernels.bracket_kernel import SETTINGS, as_float, is_drawn, largest_key, scaled
from quantkit_kernels.draw import check
from quantkit_kernels.filter_kernel import Rows, launch_filters
from quantkit_kernels.sampling_kernel import (
    NOTHING,
    best_of_parts,
    key_of,
    launch_best,
    ordered_of,
    value_of,
)
from quantkit_kernels.triton_launch import Launcher

NUM_WARPS = 8


@triton.jit
def exponential(word):
    """`draw.exponential`, of uint32."""
    v = tl.minimum(word.to(tl.float32) * 2.0**-32 + 2.0**-33, 1 - 2.0**-24)
    near_zero = v * (1 + v * (1 / 2 + v * (1 / 3 + v * (1 / 4))))
    return tl.where(v < 1 / 64, near_zero, -tl.log(1 - v))


@triton.jit
def noise_of(setting, position, first, PART: tl.constexpr):
    """float32 [PART], of tokens from `first` on, a multiple of 4."""
    number = (first // 4 + tl.arange(0, PART // 4)).to(tl.uint32)
    zero = number * 0
    low = tl.load(setting + 4).to(tl.uint32, bitcast=True) + zero
    high = tl.load(setting + 5).to(tl.uint32, bitcast=True) + zero
    a, b, c, d = tl.philox_impl(number, position.to(tl.uint32) + zero, zero, zero, low, high)
    return exponential(tl.interleave(tl.interleave(a, c), tl.interleave(b, d)))


@triton.jit
def is_left(short, cuts, ties, part, SHIFT: tl.constexpr, PARTS: tl.constexpr):
    """Whether the filters keep it: above the cut, or one of its first ties."""
    cut, kept_ties = tl.load(cuts), tl.load(cuts + 1)
    is_cut = cut != NOTHING >> SHIFT  # nothing was counted otherwise
    number = tl.arange(0, PARTS)
    left = kept_ties - tl.sum(tl.load(ties + number, mask=(number < part) & is_cut, other=0), axis=0)
    is_tie = short == cut
    if is_cut & (left > 0) & (left < tl.load(ties + part)):
        is_first = tl.cumsum(is_tie.to(tl.int32), axis=0) <= left
    else:
        is_first = is_tie & (left > 0)
    return (short > cut) | (is_tie & is_first)


@triton.jit
def draw_kernel(
    logits, maxes, settings, rows, positions, cuts, ties, keys,
    num_logits, num_maxes, num_parts, stride_logits,
    IS_FILTERED: tl.constexpr, SHIFT: tl.constexpr, PARTS: tl.constexpr, MAXES: tl.constexpr, EARLY: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """keys: int64 [B, parts], of the least score, negated; of the row's largest logit where chance does not decide."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    setting = settings + tl.load(rows + row) * SETTINGS
    best = largest_key(maxes + row * num_maxes, num_maxes, MAXES)
    if is_drawn(setting, best):
        index = part * PART + tl.arange(0, PART)
        is_kept = index < num_logits
        logit = tl.load(logits + row * stride_logits + index, mask=is_kept, other=-float("inf")).to(
            tl.float32
        )
        scaled_logit = scaled(logit, value_of(best), as_float(setting))
        is_kept &= scaled_logit >= as_float(setting + 3)
        if IS_FILTERED:
            short = ordered_of(logit) >> SHIFT
            is_kept &= is_left(short, cuts + row * 2, ties + row * num_parts, part, SHIFT, PARTS)
        best = key_of(tl.full([], NOTHING, tl.int32), part * PART)
        if tl.max(is_kept.to(tl.int32), axis=0) > 0:
            score = noise_of(setting, tl.load(positions + row), part * PART, PART) * tl.exp(-scaled_logit)
            score = tl.where(is_kept, score, float("inf"))
            least = tl.min(score, axis=0)
            first = tl.min(tl.where(score == least, index, num_logits), axis=0)
            best = key_of(ordered_of(-least), first)
    tl.store(keys + row * num_parts + part, best)


_draw = Launcher(draw_kernel)


def launch(
    logits_BV: Tensor, settings_R: Tensor, rows_B: Tensor, positions_B: Tensor, is_filtered: bool
) -> tuple[Tensor, Tensor]:
    """`draw` without the operator around it."""
    check(logits_BV, settings_R, rows_B, positions_B)
    num_rows, num_logits = logits_BV.shape
    rows = Rows(logits_BV, settings_R, rows_B, best_of_parts(logits_BV))
    keys = rows.maxes.new_empty(num_rows, rows.num_parts)
    if num_rows > 0:
        cuts, ties = launch_filters(rows) if is_filtered else (settings_R, settings_R)
        operands = (logits_BV, rows.maxes, settings_R, rows_B, positions_B, cuts, ties, keys)
        arguments = (*operands, num_logits, rows.maxes.shape[1], rows.num_parts, logits_BV.stride(0))
        constants = (is_filtered, *rows.constants)
        early = constants[4]
        _draw((num_rows, rows.num_parts), arguments, constants, num_warps=NUM_WARPS, early=early)
    return launch_best(keys)
