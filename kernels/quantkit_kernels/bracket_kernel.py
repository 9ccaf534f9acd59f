"""What the kernels of `draw` know of a row, and the brackets that its cut is sought in.

    low = e0 ≤ e1 ≤ … ≤ e7 ≤ end       above: the weight of what is ≥ end       target: what the cut's weight reaches

Edges are first quadratically below the largest logit, then evenly between two of those (where one is infinite, not at
all: the cut is found all the same).

A logit is an integer here (`short`), ordered like logits, without the bits that their dtype lacks.
"""

import triton
import triton.language as tl

from quantkit_kernels.draw import NUM_SETTINGS
from quantkit_kernels.sampling_kernel import NAN, NOTHING, float_of, ordered_of

EDGES = 8
BRACKET = 4  # numbers of one

SETTINGS = tl.constexpr(NUM_SETTINGS)
_EDGES = tl.constexpr(EDGES)


@triton.jit
def as_float(pointer):
    """A float32 that stands among int32."""
    return tl.load(pointer).to(tl.float32, bitcast=True)


@triton.jit
def largest_key(maxes, num_maxes, MAXES: tl.constexpr):
    """The key of a row's largest logit."""
    number = tl.arange(0, MAXES)
    return tl.max(tl.load(maxes + number, mask=number < num_maxes, other=-(2**63)), axis=0)


@triton.jit
def is_drawn(setting, largest):
    """Whether chance decides."""
    return (as_float(setting) > 0) & ((largest >> 32) != NAN)


@triton.jit
def has_top_k(setting, num_logits):
    """Whether top k may drop something."""
    count = tl.load(setting + 1)
    return (count > 0) & (count < num_logits)


@triton.jit
def is_filtered(setting, num_logits):
    """Whether top k or top p may."""
    return has_top_k(setting, num_logits) | (as_float(setting + 2) < 1.0)


@triton.jit
def scaled(value, largest, inverse):
    """(value − largest) / temperature, 0 for the largest."""
    return tl.where(value == largest, 0.0, (value - largest) * inverse)


@triton.jit
def value_of_short(short, SHIFT: tl.constexpr):
    """The float32 of an ordered integer, missing bits 0."""
    bits = float_of(short << SHIFT).to(tl.int32, bitcast=True)
    return ((bits >> SHIFT) << SHIFT).to(tl.float32, bitcast=True)


@triton.jit
def weight_of(short, largest, inverse, is_count, SHIFT: tl.constexpr):
    """What one token adds to those before the next."""
    return tl.where(is_count, 1.0, tl.exp(scaled(value_of_short(short, SHIFT), largest, inverse)))


@triton.jit
def edge_of(number, low, end, largest, inverse, is_count, IS_FIRST: tl.constexpr, SHIFT: tl.constexpr):
    """One of the edges, or all: the first is `low`. Every operation is exact or rounds once, so that all agree."""
    if IS_FIRST:
        distance = (number - _EDGES) * (number - _EDGES) * 0.25
        value = tl.fma(tl.where(is_count, -1.0, -1.0 / inverse), distance, largest)
    else:
        lowest = value_of_short(low, SHIFT)
        value = tl.fma(value_of_short(end, SHIFT) - lowest, number * (1.0 / _EDGES), lowest)
    edge = tl.maximum(tl.minimum(ordered_of(value) >> SHIFT, end), low)
    return tl.where(number == 0, low, edge)


@triton.jit
def weights_above(
    short, is_inside, low, end, largest, inverse, is_count, IS_FIRST: tl.constexpr, SHIFT: tl.constexpr,
    SIZE: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Weight of what is inside and ≥ each edge: float32 [THREADS, 8], to be added up."""
    by_thread: tl.constexpr = (SIZE // (8 * THREADS), THREADS, 8)
    weight = tl.where(is_inside, weight_of(short, largest, inverse, is_count, SHIFT), 0.0)
    weight, short = tl.reshape(weight, by_thread), tl.reshape(short, by_thread)
    weights = joined_weights(short, weight, low, end, largest, inverse, is_count, IS_FIRST, SHIFT, 0, 1)
    return tl.reshape(weights, (THREADS, _EDGES))


@triton.jit
def joined_weights(
    short, weight, low, end, largest, inverse, is_count, IS_FIRST: tl.constexpr, SHIFT: tl.constexpr,
    NUMBER: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """[THREADS, 2, …]: of edges NUMBER, NUMBER + STEP, NUMBER + 2 STEP, …; without moving anything between threads."""
    if STEP == _EDGES:
        edge = edge_of(NUMBER, low, end, largest, inverse, is_count, IS_FIRST, SHIFT)
        weights = tl.sum(tl.sum(tl.where(short >= edge, weight, 0.0), axis=2), axis=0)
    else:
        even = joined_weights(
            short, weight, low, end, largest, inverse, is_count, IS_FIRST, SHIFT, NUMBER, 2 * STEP
        )
        odd = joined_weights(
            short, weight, low, end, largest, inverse, is_count, IS_FIRST, SHIFT, NUMBER + STEP, 2 * STEP
        )
        weights = tl.join(even, odd)
    return weights


@triton.jit
def resolve(
    low, end, above, target, sums, largest, inverse, is_count, num_parts, IS_FIRST: tl.constexpr, SHIFT: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """low, end, above, target of the interval that the cut lies in, by the weights above the edges in there."""
    number, part = tl.arange(0, _EDGES), tl.arange(0, PARTS)
    each = tl.load(sums + part[:, None] * _EDGES + number[None, :], mask=part[:, None] < num_parts, other=0.0)
    weights = tl.sum(each, axis=0)
    if IS_FIRST:
        target *= tl.where(is_count, 1.0, tl.max(weights, axis=0))
    edges = edge_of(number, low, end, largest, inverse, is_count, IS_FIRST, SHIFT)
    is_reached = above + weights >= target
    is_reached |= number == 0  # it was, before these sums were rounded otherwise
    above += tl.max(tl.where(is_reached, 0.0, weights), axis=0)
    return (
        tl.max(tl.where(is_reached, edges, low), axis=0),
        tl.min(tl.where(is_reached, end, edges), axis=0),
        above,
        target,
    )


@triton.jit
def bracket_of(brackets, setting, largest_of_row, num_logits, IS_FIRST: tl.constexpr, SHIFT: tl.constexpr):
    """low, end, above, target: as stored, or before anything is known."""
    if IS_FIRST:
        low = tl.full([], NOTHING, tl.int32) >> SHIFT
        end = ((largest_of_row >> 32).to(tl.int32) >> SHIFT) + 1
        count = tl.load(setting + 1).to(tl.float32)
        target = tl.where(has_top_k(setting, num_logits), count, as_float(setting + 2))
        result = low + 1, end, 0.0 * target, target
    else:
        result = tl.load(brackets), tl.load(brackets + 1), as_float(brackets + 2), as_float(brackets + 3)
    return result
