"""Moments of each column of a tall matrix in one read: sum, Σ|x|, Σx², largest |x|.

A NaN anywhere makes all four numbers of its column NaN, an infinity makes none of them finite.
Shape suffixes: T tokens, K features.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from quantkit_kernels.operators import operator


class Moments(NamedTuple):
    """Of each column, float32 [K]: Σx, Σ|x|, Σx², max |x|."""

    sum_K: Tensor
    abs_K: Tensor
    square_K: Tensor
    max_K: Tensor


def plain(x_TK: Tensor) -> Tensor:
    """`column_moments` in plain torch."""
    x_TK = x_TK.float()
    magnitude_TK = x_TK.abs()
    sums = (x_TK.sum(dim=0), magnitude_TK.sum(dim=0), x_TK.square().sum(dim=0), magnitude_TK.amax(dim=0))
    return torch.stack(sums)


def _fake(x_TK: Tensor) -> Tensor:
    return x_TK.new_empty(4, x_TK.shape[1], dtype=torch.float32)


@operator("column_moments", cpu=plain, fake=_fake)
def column_moments(x_TK: Tensor) -> Tensor:
    """Σx, Σ|x|, Σx² and max |x| of each column, float32 [4, K]. x_TK: any float dtype, columns contiguous."""
    from quantkit_kernels import moments_kernel

    return moments_kernel.launch(x_TK)


def moments(x_TK: Tensor) -> Moments:
    """`column_moments` by name."""
    return Moments(*column_moments(x_TK))
