"""The filters of `draw` on a GPU: where top k and top p cut a row, without sorting it.

    weigh   logits [B, V]          the weight above each of 8 edges, of each part
    list    logits [B, V]          the logits between two edges, of each part
    weigh   lists [B, parts, …]    once more, where lists are long
    list    lists [B, parts, …]
    cut     lists [B, parts, …]    where exactly, by halves; how many logits of each part equal that

A filter keeps tokens while the weight of those before is below a target: top k weighs each 1 and aims at k, top p
weighs exp((logit − largest) / temperature) and aims at p of what top k left. What top k leaves is few: the lists of a
row with top k hold all from the lower edge on, and top p is found in them.

Sums are float32, of parts whose size is fixed, so that a row's result does not depend on how many parts one program
takes.

Bound: bytes, two reads of the logits; with many rows 8 comparisons and sums for each logit.
Shape suffixes: B rows, V vocab.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantkit_kernels.bracket_kernel import (
    BRACKET,
    EDGES,
    SETTINGS,
    as_float,
    bracket_of,
    has_top_k,
    is_drawn,
    is_filtered,
    largest_key,
    resolve,
    weight_of,
    weights_above,
)
from quantkit_kernels.capability import starts_early
from quantkit_kernels.sampling_kernel import NOTHING, ordered_bits, value_of
from quantkit_kernels.triton_launch import Launcher, num_parts, power_above

PART = 4096
WEIGH_WARPS, LIST_WARPS, CUT_WARPS = 8, 8, 16
WIDTH = 128  # of the lists of all parts, what `cut` looks at at a time
MISSING_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}  # of float32
PROGRAMS = 1024  # about as many as run at a time

_EDGES = tl.constexpr(EDGES)
_BRACKET = tl.constexpr(BRACKET)


@triton.jit
def longest_of(lengths, num_parts, PARTS: tl.constexpr):
    """Length of a row's longest list."""
    part = tl.arange(0, PARTS)
    return tl.max(tl.load(lengths + part, mask=part < num_parts, other=0), axis=0)


@triton.jit
def load_part(logits, lists, offset, length, first_index, IS_FIRST: tl.constexpr, SHIFT: tl.constexpr):
    """Logits of a part, as ordered integers: from the row, or from its list."""
    if IS_FIRST:
        short = ordered_bits(logits, first_index + offset, offset < length) >> SHIFT
    else:
        short = tl.load(lists + offset, mask=offset < length, other=0).to(tl.int32)
    return short


@triton.jit(do_not_specialize=["per_program"])  # one kernel for every batch
def weigh_kernel(
    logits, maxes, settings, rows, brackets, lists, lengths, sums,
    num_logits, num_maxes, num_parts, per_program, stride_logits,
    IS_FIRST: tl.constexpr, SHIFT: tl.constexpr, PARTS: tl.constexpr, MAXES: tl.constexpr, EARLY: tl.constexpr,
    PART: tl.constexpr, SIZE: tl.constexpr, THREADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """sums: float32 [B, parts, 8], above the edges in a bracket, or above the first. SIZE: logits at a time."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1) * per_program
    last = tl.minimum(part + per_program, num_parts)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    setting = settings + tl.load(rows + row) * SETTINGS
    largest_of_row = largest_key(maxes + row * num_maxes, num_maxes, MAXES)
    if not (is_drawn(setting, largest_of_row) & is_filtered(setting, num_logits)):
        return
    if not IS_FIRST and longest_of(lengths + row * num_parts, num_parts, PARTS) <= WIDTH:
        return
    largest, inverse = value_of(largest_of_row), as_float(setting)
    is_count = has_top_k(setting, num_logits)
    low, end, _, _ = bracket_of(
        brackets + row * _BRACKET, setting, largest_of_row, num_logits, IS_FIRST, SHIFT
    )
    while part < last:
        place = row * num_parts + part
        length = tl.minimum(num_logits - part * PART, PART) if IS_FIRST else tl.load(lengths + place)
        weights, start = tl.zeros((THREADS, _EDGES), tl.float32), part * 0
        while start < length:
            offset = start + tl.arange(0, SIZE)
            short = load_part(
                logits + row * stride_logits,
                lists + place * PART,
                offset,
                length,
                part * PART,
                IS_FIRST,
                SHIFT,
            )
            is_inside = (offset < length) & (short < end)
            weights += weights_above(
                short, is_inside, low, end, largest, inverse, is_count, IS_FIRST, SHIFT, SIZE, THREADS
            )
            start += SIZE
        tl.store(sums + place * _EDGES + tl.arange(0, _EDGES), tl.sum(weights, axis=0))
        part += 1


@triton.jit
def places_of(is_listed, PART: tl.constexpr):
    """How many are listed before each, and in all; by eights, which a thread has, at little more than half the cost.

    Known to a thread only after all that come before have been loaded, so that a list can be made of itself.
    """
    listed = tl.reshape(is_listed.to(tl.int32), (PART // 8, 8))
    of_eight = tl.sum(listed, axis=1)
    before = tl.cumsum(of_eight, axis=0) - of_eight
    places = before[:, None] + tl.cumsum(listed, axis=1) - listed
    return tl.reshape(places, (PART,)), tl.sum(of_eight, axis=0)


@triton.jit(do_not_specialize=["per_program"])  # one kernel for every batch
def list_kernel(
    logits, maxes, settings, rows, sums, brackets, inner_brackets, lists, lengths, inner_lengths,
    num_logits, num_maxes, num_parts, per_program, stride_logits,
    IS_FIRST: tl.constexpr, SHIFT: tl.constexpr, PARTS: tl.constexpr, MAXES: tl.constexpr, EARLY: tl.constexpr,
    PART: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """inner_brackets: [B, 4]. lists: [B, parts, PART], of inner_lengths [B, parts].

    A list is made of itself, of `lengths`, in place; lists that are all short stay as they are.
    """
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * per_program
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    setting = settings + tl.load(rows + row) * SETTINGS
    largest_of_row = largest_key(maxes + row * num_maxes, num_maxes, MAXES)
    if not (is_drawn(setting, largest_of_row) & is_filtered(setting, num_logits)):
        return
    is_count = has_top_k(setting, num_logits)
    low, end, above, target = bracket_of(
        brackets + row * _BRACKET, setting, largest_of_row, num_logits, IS_FIRST, SHIFT
    )
    is_long = IS_FIRST or longest_of(lengths + row * num_parts, num_parts, PARTS) > WIDTH
    if is_long:
        low, end, above, target = resolve(
            low, end, above, target, sums + row * num_parts * _EDGES,
            value_of(largest_of_row), as_float(setting), is_count, num_parts, IS_FIRST, SHIFT, PARTS,
        )  # fmt: skip
    if first == 0:
        inner_brackets += row * _BRACKET
        tl.store(inner_brackets, low)
        tl.store(inner_brackets + 1, end)
        tl.store(inner_brackets + 2, above.to(tl.int32, bitcast=True))
        tl.store(inner_brackets + 3, target.to(tl.int32, bitcast=True))
    part, last = first, tl.minimum(first + per_program, num_parts)
    while part < last:
        place = row * num_parts + part
        length = tl.minimum(num_logits - part * PART, PART) if IS_FIRST else tl.load(lengths + place)
        if is_long:
            offset = tl.arange(0, PART)
            short = load_part(
                logits + row * stride_logits,
                lists + place * PART,
                offset,
                length,
                part * PART,
                IS_FIRST,
                SHIFT,
            )
            is_listed = (offset < length) & (short >= low) & (is_count | (short < end))
            place_in_list, length = places_of(is_listed, PART)
            tl.store(lists + place * PART + place_in_list, short, mask=is_listed)
        tl.store(inner_lengths + place, length)
        part += 1


@triton.jit
def listed_weight(lists, lengths, edge, largest, inverse, is_count, SHIFT: tl.constexpr, WIDTH: tl.constexpr):
    """The weight of what a row's lists hold from an edge on. lists: pointers [parts, 1], lengths [parts, 1]."""
    longest = tl.max(lengths)
    weight, start = 0.0 * inverse, longest * 0
    while start < longest:
        number = start + tl.arange(0, WIDTH)[None, :]
        short = tl.load(lists + number, mask=number < lengths, other=0).to(tl.int32)
        is_above = (number < lengths) & (short >= edge)
        each = tl.where(is_above, weight_of(short, largest, inverse, is_count, SHIFT), 0.0)
        weight += tl.sum(tl.sum(each, axis=1), axis=0)
        start += WIDTH
    return weight


@triton.jit
def bisect(
    lists, lengths, not_listed, low, end, above, target, largest, inverse, is_count, SHIFT: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """The lowest logit that is kept, and how many that equal it are. not_listed: the part of `above` in no list."""
    middle = (low & end) + ((low ^ end) >> 1)
    while middle > low:
        listed = listed_weight(lists, lengths, middle, largest, inverse, is_count, SHIFT, WIDTH)
        weight = not_listed + listed
        is_reached = weight >= target
        above = tl.where(is_reached, above, weight)
        low, end = tl.where(is_reached, middle, low), tl.where(is_reached, end, middle)
        middle = (low & end) + ((low ^ end) >> 1)
    return low, first_ties(target - above, weight_of(low, largest, inverse, is_count, SHIFT))


@triton.jit
def first_ties(missing, weight):
    """How many of equal weight are kept, of which the first is."""
    return tl.maximum(tl.minimum(tl.ceil(missing / weight), 2.0**30), 1.0).to(tl.int32)


@triton.jit
def cut_kernel(
    maxes, settings, rows, brackets, lists, lengths, cuts, ties, num_logits, num_maxes, num_parts,
    SHIFT: tl.constexpr, PARTS: tl.constexpr, MAXES: tl.constexpr, EARLY: tl.constexpr, PART: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """cuts: int32 [B, 2], the lowest logit kept and how many that equal it are. ties: int32 [B, parts], that do."""
    row = tl.program_id(0).to(tl.int64)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    setting = settings + tl.load(rows + row) * SETTINGS
    largest_of_row = largest_key(maxes + row * num_maxes, num_maxes, MAXES)
    if not is_drawn(setting, largest_of_row):
        return
    cuts += row * 2
    if not is_filtered(setting, num_logits):
        tl.store(cuts, tl.full([], NOTHING, tl.int32) >> SHIFT)
        return
    largest, inverse = value_of(largest_of_row), as_float(setting)
    is_count = has_top_k(setting, num_logits)
    low, end, above, target = bracket_of(
        brackets + row * _BRACKET, setting, largest_of_row, num_logits, False, SHIFT
    )
    part = tl.arange(0, PARTS)[:, None]
    lengths = tl.load(lengths + row * num_parts + part, mask=part < num_parts, other=0)
    lists += (row * num_parts + part) * PART
    not_listed = tl.where(is_count, 0.0, above)
    cut, kept = bisect(
        lists, lengths, not_listed, low, end, above, target, largest, inverse, is_count, SHIFT, WIDTH
    )
    share = as_float(setting + 2)
    if is_count & (share < 1.0):
        weight = weight_of(cut, largest, inverse, False, SHIFT)
        above = listed_weight(lists, lengths, cut + 1, largest, inverse, False, SHIFT, WIDTH)
        target = share * (above + kept * weight)
        if above < target:
            kept = tl.minimum(kept, first_ties(target - above, weight))
        else:
            end = ((largest_of_row >> 32).to(tl.int32) >> SHIFT) + 1
            none = 0.0 * above
            cut, kept = bisect(
                lists, lengths, none, cut + 1, end, none, target, largest, inverse, False, SHIFT, WIDTH
            )
    tl.store(cuts, cut)
    tl.store(cuts + 1, kept)
    longest = tl.max(lengths)
    equal, start = tl.zeros((PARTS, WIDTH), tl.int32), longest * 0
    while start < longest:
        number = start + tl.arange(0, WIDTH)[None, :]
        short = tl.load(lists + number, mask=number < lengths, other=0).to(tl.int32)
        equal += ((number < lengths) & (short == cut)).to(tl.int32)
        start += WIDTH
    part = tl.arange(0, PARTS)
    tl.store(ties + row * num_parts + part, tl.sum(equal, axis=1), mask=part < num_parts)


_weigh = Launcher(weigh_kernel)
_list = Launcher(list_kernel)
_cut = Launcher(cut_kernel)


class Rows(NamedTuple):
    """What is known of rows before they are filtered: operands of `draw`, and the largest logits of their parts."""

    logits_BV: Tensor
    settings_R: Tensor
    rows_B: Tensor
    maxes: Tensor

    @property
    def shift(self) -> int:
        """Bits that are the same in all float32 of the dtype."""
        return MISSING_BITS[self.logits_BV.dtype]

    @property
    def num_parts(self) -> int:
        """Of each row."""
        return num_parts(self.logits_BV.shape[1], PART)

    @property
    def constants(self) -> tuple[int, int, int, bool, int]:
        """SHIFT, PARTS, MAXES, EARLY, PART."""
        widths = power_above(self.num_parts), power_above(self.maxes.shape[1])
        return (self.shift, *widths, starts_early(self.logits_BV.device), PART)


def launch_filters(rows: Rows) -> tuple[Tensor, Tensor]:
    """The cut of each row, int32 [B, 2] (its ordered bits, how many that equal it are kept), and ties [B, parts]."""
    num_rows, num_logits = rows.logits_BV.shape
    per_program = num_parts(num_rows * rows.num_parts, PROGRAMS)
    grid = (num_rows, num_parts(rows.num_parts, per_program))
    counts = (num_logits, rows.maxes.shape[1], rows.num_parts)
    numbers = (*counts, per_program, rows.logits_BV.stride(0))
    operands = (rows.logits_BV, rows.maxes, rows.settings_R, rows.rows_B)
    new = rows.settings_R.new_empty
    sums = new(2, num_rows, rows.num_parts, EDGES, dtype=torch.float32)
    lists = new(num_rows, rows.num_parts, PART, dtype=torch.int16 if rows.shift == 16 else torch.int32)
    brackets, lengths = new(2, num_rows, BRACKET), new(2, num_rows, rows.num_parts)
    cuts, ties = new(num_rows, 2), new(num_rows, rows.num_parts)
    early = starts_early(rows.logits_BV.device)
    for number, is_first in enumerate((True, False)):
        listed = (brackets[0], lists, lengths[0], sums[number])
        size = PART if is_first else 8 * 32 * WEIGH_WARPS
        how = (is_first, *rows.constants, size, 32 * WEIGH_WARPS, WIDTH)
        _weigh(grid, (*operands, *listed, *numbers), how, num_warps=WEIGH_WARPS, early=early)
        inner = (sums[number], brackets[0], brackets[number], lists, lengths[0], lengths[number])
        constants = (is_first, *rows.constants, WIDTH)
        _list(grid, (*operands, *inner, *numbers), constants, num_warps=LIST_WARPS, early=early)
    arguments = (*operands[1:], brackets[1], lists, lengths[1], cuts, ties, *counts)
    _cut((num_rows, 1), arguments, (*rows.constants, WIDTH), num_warps=CUT_WARPS, early=early)
    return cuts, ties
