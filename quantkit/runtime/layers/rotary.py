"""Rotary position embeddings: the frequencies of each published variant, and the angles of all positions.

Frequencies, angles, cosine and sine are float32, and so is the rotation. (transformers rounds cosine and sine to the
dtype of the model first: in 16 bits its queries and keys have one rounding more.)
Shape suffixes: C positions, R rotated dimensions.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class DefaultRope:
    """Frequencies theta^(−2i / D)."""

    theta: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearRope:
    """All frequencies divided by `factor`."""

    theta: float
    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Rope:
    """Long wavelengths divided by `factor`, short ones kept, those between blended (Llama 3.1)."""

    theta: float
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnRope:
    """Blend by dimension, and cosine and sine scaled by `attention_factor` (arXiv:2309.00071)."""

    theta: float
    factor: float
    original_positions: int
    beta_fast: float
    beta_slow: float
    attention_factor: float
    truncate: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LongRope:
    """Each frequency divided by a factor of its own, cosine and sine scaled by `attention_factor` (arXiv:2402.13753).

    There are two sets of factors: `short` for contexts up to `original_positions`, else `long`. Keys rotated by one
    set cannot be met by queries rotated by the other, so a model has one set for all that it does: `long` if its
    context may exceed `original_positions`, however short a text is.
    """

    theta: float
    short: tuple[float, ...]
    long: tuple[float, ...]
    original_positions: int
    attention_factor: float


@dataclass(frozen=True, slots=True)
class NoRope:
    """No dimension is rotated."""


Rope = DefaultRope | LinearRope | Llama3Rope | YarnRope | LongRope | NoRope


class Angles(NamedTuple):
    """Cosine and sine of every position, float32 [C, R / 2] each: made once, for all layers that rotate alike."""

    cos: Tensor
    sin: Tensor


def make_angles(rope: Rope, rotary_dim: int, num_positions: int, device: torch.device) -> Angles:
    """The angles of positions from 0 on."""
    positions_C1 = torch.arange(num_positions, dtype=torch.float32, device=device)[:, None]
    angles = positions_C1 * frequencies(rope, rotary_dim, num_positions).to(device)
    factor = rope.attention_factor if isinstance(rope, YarnRope | LongRope) else 1.0
    return Angles(angles.cos() * factor, angles.sin() * factor)


def frequencies(rope: Rope, rotary_dim: int, max_positions: int) -> Tensor:
    """Radians per position, float32 [R/2]. max_positions: that the model is ever run with."""
    if isinstance(rope, NoRope):
        return torch.empty(0)
    plain = 1.0 / rope.theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)
    match rope:
        case DefaultRope():
            return plain
        case LinearRope():
            return plain / rope.factor
        case Llama3Rope():
            return _llama3(plain, rope)
        case YarnRope():
            return _yarn(plain, rope, rotary_dim)
        case LongRope():
            return plain / torch.tensor(rope.long if max_positions > rope.original_positions else rope.short)


def _llama3(plain: Tensor, rope: Llama3Rope) -> Tensor:
    wavelength = 2 * math.pi / plain
    longest_kept = rope.original_positions / rope.high_freq_factor
    shortest_divided = rope.original_positions / rope.low_freq_factor
    kept_share = (rope.original_positions / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - kept_share) * plain / rope.factor + kept_share * plain
    result = torch.where(wavelength > shortest_divided, plain / rope.factor, blended)
    return torch.where(wavelength < longest_kept, plain, result)


def _yarn(plain: Tensor, rope: YarnRope, head_dim: int) -> Tensor:
    low = _yarn_dimension(rope.beta_fast, rope, head_dim)
    high = _yarn_dimension(rope.beta_slow, rope, head_dim)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    divided_share = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return plain / rope.factor * divided_share + plain * (1 - divided_share)


def _yarn_dimension(rotations: float, rope: YarnRope, head_dim: int) -> float:
    """The (fractional) pair that turns this often over the original context."""
    return (
        head_dim * math.log(rope.original_positions / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))
    )
