"""What every kernel is built from: the codes of one weight and the scales of its tiles.

A tile is the rectangle of weights that share a scale. With tile = (rows, cols) one description covers all
granularities of a weight [N, K]:

    per tensor  (N, K)      per channel  (1, K)      per group of g  (1, g)      128x128 blocks  (128, 128)

Shape suffixes: N out_features, K in_features, G scale columns, R scale rows.
"""

from typing import NamedTuple

from torch import Tensor


class LinearWeight(NamedTuple):
    """w ≈ (codes − zero_point) · scale.

    codes_NK: int8 of `bits` bits, or float8_e4m3fn (bits 8). scale_RG: float [ceil(N / rows), ceil(K / cols)].
    zero_point_RG: int8 of the same shape, or None. tile: (rows, cols).
    """

    codes_NK: Tensor
    scale_RG: Tensor
    zero_point_RG: Tensor | None
    tile: tuple[int, int]
    bits: int

    @property
    def stored_bits(self) -> int:
        """Of a code as the kernels for GPUs keep it: INT4 and INT8 hold what has fewer bits."""
        return 4 if self.bits <= 4 else 8

    @property
    def is_per_row(self) -> bool:
        """Whether each row has one scale, be it shared with other rows."""
        rows, cols = self.tile
        return cols == self.codes_NK.shape[1] and rows in (1, self.codes_NK.shape[0])
