"""Rotary position embeddings: the frequencies of each published variant, and the rotation.

Frequencies and angles are float32; cosine and sine are rounded to the dtype of the model, as transformers does.
Shape suffixes: T tokens, H heads, D head_dim.
"""

import math
from dataclasses import dataclass

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


Rope = DefaultRope | LinearRope | Llama3Rope | YarnRope


def cos_sin(rope: Rope, head_dim: int, positions_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position, each [T, D], the halves of D alike."""
    angles = positions_T.to(torch.float32)[:, None] * frequencies(rope, head_dim)
    angles_TD = torch.cat((angles, angles), dim=-1)
    factor = rope.attention_factor if isinstance(rope, YarnRope) else 1.0
    return (angles_TD.cos() * factor).to(dtype), (angles_TD.sin() * factor).to(dtype)


def rotate(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D/2) of every head by the angle of its token."""
    first, second = x_THD.chunk(2, dim=-1)
    turned_THD = torch.cat((-second, first), dim=-1)
    return x_THD * cos_TD.unsqueeze(1) + turned_THD * sin_TD.unsqueeze(1)


def frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Radians per position, float32 [D/2]."""
    plain = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    match rope:
        case DefaultRope():
            return plain
        case LinearRope():
            return plain / rope.factor
        case Llama3Rope():
            return _llama3(plain, rope)
        case YarnRope():
            return _yarn(plain, rope, head_dim)


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
