"""`column_moments` on a GPU.

    x [T, K]   a program: TOKENS rows, ROWS at a time, × COLUMNS columns   ->  partial sums [T / TOKENS, 4, K]

The partial sums are added afterwards, in order, so the result is the same on every run.

Bound: 2 bytes per element of a bf16 matrix, a few operations each: memory.
Shape suffixes: T tokens, K features.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit_kernels.operators import on_its_device

TOKENS, ROWS, COLUMNS, NUM_WARPS = 512, 8, 256, 4


@triton.jit
def moments_kernel(
    x,
    sums,
    num_tokens,
    num_features,
    stride_x,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """sums: float32 [programs along tokens, 4, K]."""
    first = tl.program_id(0).to(tl.int64) * TOKENS
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < num_features
    sum_TK = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    abs_TK = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    square_TK = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    max_TK = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, TOKENS, ROWS):
        row = first + start + tl.arange(0, ROWS)
        is_there = (row < num_tokens)[:, None] & is_column[None, :]
        x_TK = tl.load(x + row[:, None] * stride_x + column[None, :], mask=is_there, other=0.0).to(tl.float32)
        sum_TK += x_TK
        abs_TK += tl.abs(x_TK)
        square_TK += x_TK * x_TK
        max_TK = tl.maximum(max_TK, tl.abs(x_TK))
    at = sums + tl.program_id(0).to(tl.int64) * 4 * num_features + column
    abs_K = tl.sum(abs_TK, axis=0)
    max_K = tl.where(
        abs_K == abs_K, tl.max(max_TK, axis=0), abs_K
    )  # a maximum passes over NaN, this sum does not
    tl.store(at, tl.sum(sum_TK, axis=0), mask=is_column)
    tl.store(at + num_features, abs_K, mask=is_column)
    tl.store(at + 2 * num_features, tl.sum(square_TK, axis=0), mask=is_column)
    tl.store(at + 3 * num_features, max_K, mask=is_column)


@on_its_device
def launch(x_TK: Tensor) -> Tensor:
    """`column_moments` without the operator around it."""
    num_tokens, num_features = x_TK.shape
    assert x_TK.stride(1) == 1, "columns have to be next to each other"
    num_parts = triton.cdiv(num_tokens, TOKENS)
    partial = torch.empty(num_parts, 4, num_features, dtype=torch.float32, device=x_TK.device)
    grid = (num_parts, triton.cdiv(num_features, COLUMNS))
    moments_kernel[grid](
        x_TK, partial, num_tokens, num_features, x_TK.stride(0), TOKENS, ROWS, COLUMNS, num_warps=NUM_WARPS
    )
    return torch.cat([partial[:, :3].sum(dim=0), partial[:, 3:].amax(dim=0)])
