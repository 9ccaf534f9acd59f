"""The vocabulary of number formats: which grid, which elements share a scale.

Frozen data, no tensors' contents: a spec describes a grid, `QParams` holds the numbers chosen for one tensor,
a scheme says what happens to one linear module. Whether a scheme can be stored and run is `support.py`'s
question; the arithmetic is `numerics.affine`'s.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor


@dataclass(frozen=True, slots=True)
class PerTensor:
    """One scale for the whole tensor."""


@dataclass(frozen=True, slots=True)
class PerChannel:
    """One scale per output row of a weight [N, K]."""


@dataclass(frozen=True, slots=True)
class PerGroup:
    """One scale per `size` consecutive input channels of each row; for activations, of each token."""

    size: int


@dataclass(frozen=True, slots=True)
class PerBlock:
    """One scale per tile of `rows` x `cols` weights; edge tiles may be smaller."""

    rows: int
    cols: int


@dataclass(frozen=True, slots=True)
class PerToken:
    """One scale per token, computed while running (activations only)."""


Granularity = PerTensor | PerChannel | PerGroup | PerBlock | PerToken


@dataclass(frozen=True, slots=True, kw_only=True)
class IntSpec:
    """Signed integers of `bits` bits; symmetric means zero point 0."""

    bits: int
    granularity: Granularity
    symmetric: bool = True

    @property
    def qmin(self) -> int:
        """Smallest code."""
        return -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        """Largest code."""
        return (1 << (self.bits - 1)) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatSpec:
    """FP8 e4m3 (finite, no infinity, largest value 448)."""

    granularity: Granularity

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return 8

    @property
    def symmetric(self) -> bool:
        """Floating grids have no zero point."""
        return True


Spec = IntSpec | FloatSpec


class QParams(NamedTuple):
    """Scale and zero point of one tensor, in the shape they have on disk.

    scale: float, [1] per tensor, [N, 1] per channel, [N, G] per group, [ceil(N/rows), ceil(K/cols)] per
    block.
    zero_point: int8 of the scale's shape, or None where the grid is symmetric.
    """

    scale: Tensor
    zero_point: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """What happens to one linear: its weight's grid, and its input's (None: the input stays 16-bit).

    An input spec with PerToken or PerGroup granularity is dynamic, computed while running; PerTensor is
    static, and its scale is stored in the checkpoint.
    """

    weight: Spec
    activation: Spec | None = None

    @property
    def is_static(self) -> bool:
        """Whether the input scale is stored, so has to be calibrated."""
        return self.activation is not None and isinstance(self.activation.granularity, PerTensor)


@dataclass(frozen=True, slots=True, kw_only=True)
class KVScheme:
    """How the KV cache is stored. `token`: one dynamic scale per token and head, nothing on disk."""

    dtype: Literal["fp8", "int8"]
    granularity: Literal["tensor", "head", "token"]
