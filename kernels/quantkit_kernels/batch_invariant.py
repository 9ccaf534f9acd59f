"""Rows whose result no batch changes, by ways of computing that choose by the number of rows: always as many at a time.

    x [M, K]  ->  32 rows, 32 rows, …, the rest and zeros, each a product by itself  ->  y [M, N]

Kernels of our own that take any number of rows in tiles of one shape need not be called so: they are given the shape.
Shape suffixes: M rows, N out_features, K in_features.
"""

from collections.abc import Callable

import torch
from torch import Tensor

FIXED_ROWS = 32


def in_fixed_rows(run: Callable[..., Tensor], *per_row: Tensor) -> Tensor:
    """run(*per_row), [M, N], computed FIXED_ROWS rows at a time. per_row: tensors of as many rows, at least one."""
    num_rows = len(per_row[0])
    parts = []
    for start in range(0, num_rows, FIXED_ROWS):
        rows = slice(start, start + FIXED_ROWS)
        parts.append(run(*(_filled(tensor[rows]) for tensor in per_row))[: num_rows - start])
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _filled(part: Tensor) -> Tensor:
    """FIXED_ROWS rows, the last ones zeros; laid out alike however many they were, since cuBLAS chooses by that too."""
    if len(part) == FIXED_ROWS:
        return part.contiguous()
    filled = part.new_zeros(FIXED_ROWS, *part.shape[1:])
    filled[: len(part)] = part
    return filled
