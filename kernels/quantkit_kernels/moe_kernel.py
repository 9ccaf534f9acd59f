"""`moe_linear` on a GPU: a program is a tile of one expert's rows times BN rows of that expert's weight.

    W [BN, BK] of the tile's expert · x [BM, BK]ᵀ, rows of x gathered by `slots`; a tile that nobody needs has expert -1
    and ends at once. Programs that share weights follow one another.

Bound: the bytes of the experts that got a token; with many tokens each, multiplications.
Shape suffixes: N out_features, K in_features, P pairs, G groups, M rows of a tile.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit_kernels import fragments_kernel as fragments
from quantkit_kernels.capability import HOPPER, capability
from quantkit_kernels.triton_launch import Launcher, num_parts


@triton.jit
def _int4_group(
    packed, zero_N, strip, block, num_strips, num_blocks, IS_BF16: tl.constexpr, STRIPS: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """Codes of [16 · STRIPS, 64 · BLOCKS] weights less their zero points, in bf16 or fp16: exact."""
    words = fragments.load_fragments(packed, strip, block, num_strips, num_blocks, STRIPS, BLOCKS)
    if IS_BF16:
        low, high = fragments.as_bf16(words)
    else:
        low, high = fragments.as_fp16(words)
    w_NK = fragments.rows_in_order(low, high, STRIPS, BLOCKS)
    if zero_N is not None:
        w_NK -= zero_N.to(w_NK.dtype)[:, None]
    return w_NK


@triton.jit
def _load_x(x_at, col, num_cols, is_pair, IS_INT4: tl.constexpr, COLS: tl.constexpr):
    """xᵀ [COLS, BM] from a column on, in the order of INT4's columns where it is for them."""
    k = col + tl.arange(0, COLS)
    x_MK = tl.load(x_at + k[None, :], mask=is_pair[:, None] & (k < num_cols)[None, :], other=0.0)
    if IS_INT4:
        x_MK = fragments.in_order(x_MK)
    return x_MK.T


@triton.jit
def _per_group(values, n, group, num_groups, num_outputs):
    """Of rows n, from [N / 16, G, 16]."""
    at = (n // 16) * (num_groups * 16) + group * 16 + n % 16
    return tl.load(values + at, mask=(n < num_outputs) & (group < num_groups), other=0)


@triton.jit(do_not_specialize=["num_pairs", "pairs_per_row", "x_scale_step"])  # one kernel for every batch
def grouped_kernel(
    y, x, w, x_scale, w_scale, w_zero_point, slots, expert_of_tile,
    num_pairs, pairs_per_row, num_outputs, num_cols, num_groups, stride_w, stride_scale, stride_x, stride_y,
    x_scale_step,
    IS_INT4: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """pairs_per_row: those that share a row of x. stride_w, stride_scale: of an expert. num_cols: of x, w has more."""
    tile = tl.program_id(0)
    tile_n = tl.program_id(1)
    expert = tl.load(expert_of_tile + tile).to(tl.int64)
    if expert >= 0:
        n = tile_n * BN + tl.arange(0, BN)
        slot = tl.load(slots + tile * BM + tl.arange(0, BM))
        is_pair = slot < num_pairs
        row = (slot // pairs_per_row).to(tl.int64)
        x_at = x + row[:, None] * stride_x
        w += expert * stride_w
        num_blocks = tl.cdiv(num_cols, 64)
        cols_w = tl.cdiv(num_cols, 16) * 16
        if not IS_INT4:
            w_at = w + tl.minimum(n, num_outputs - 1).to(tl.int64)[:, None] * cols_w
        if w_scale is not None:
            w_scale += expert * stride_scale
        if w_zero_point is not None:
            w_zero_point += expert * stride_scale
        acc = tl.zeros((BN, BM), dtype=tl.float32)
        for step in tl.range(0, tl.cdiv(num_cols, BK), num_stages=STAGES):
            k = step * BK + tl.arange(0, BK)
            x_KM = _load_x(x_at, step * BK, num_cols, is_pair, IS_INT4, 32 if GROUP == 32 else BK)
            if IS_INT4:
                zero_N = None
                if w_zero_point is not None:
                    zero_N = _per_group(w_zero_point, n, step * BK // GROUP, num_groups, num_outputs)
                w_NK = _int4_group(
                    w, zero_N, tile_n * (BN // 16), step * (BK // 64), tl.cdiv(num_outputs, 16), num_blocks,
                    x.dtype.element_ty == tl.bfloat16, BN // 16, BK // 64,
                )  # fmt: skip
            else:
                w_NK = tl.load(w_at + k[None, :], mask=(k < cols_w)[None, :], other=0.0)
                if x.dtype.element_ty != tl.float8e4nv:
                    w_NK = w_NK.to(x.dtype.element_ty)
            if GROUP == 0:
                if x.dtype.element_ty == tl.float8e4nv:
                    acc += tl.dot(w_NK, x_KM)
                else:
                    acc = tl.dot(w_NK, x_KM, acc)
            elif IS_INT4 and GROUP == 32:
                scale_N = _per_group(w_scale, n, step * 2, num_groups, num_outputs).to(tl.float32)
                scale2_N = _per_group(w_scale, n, step * 2 + 1, num_groups, num_outputs).to(tl.float32)
                left_NK, right_NK = fragments.halves(w_NK)
                if w_zero_point is not None:  # those of the first half were subtracted from both
                    zero2_N = _per_group(w_zero_point, n, step * 2 + 1, num_groups, num_outputs)
                    right_NK += (zero_N - zero2_N).to(w_NK.dtype)[:, None]
                acc += tl.dot(left_NK, x_KM) * scale_N[:, None]
                x_KM = _load_x(x_at, step * BK + 32, num_cols, is_pair, IS_INT4, 32)
                acc += tl.dot(right_NK, x_KM) * scale2_N[:, None]
            elif IS_INT4:
                scale_N = _per_group(w_scale, n, step, num_groups, num_outputs).to(tl.float32)
                acc += tl.dot(w_NK, x_KM) * scale_N[:, None]
            else:
                scale = tl.load(w_scale + tile_n * BN // GROUP * num_groups + step)
                scale_M = tl.full((BM,), 1.0, tl.float32)
                if x_scale is not None:
                    scale_M = tl.load(x_scale + row * x_scale_step + step, mask=is_pair, other=0.0)
                acc += tl.dot(w_NK, x_KM) * (scale_M * scale)[None, :]
        if GROUP == 0:
            if w_scale is not None:
                acc *= tl.load(w_scale + n, mask=n < num_outputs, other=0.0)[:, None]
            if x_scale is not None:
                acc *= tl.load(x_scale + row * x_scale_step, mask=is_pair, other=0.0)[None, :]
        at = slot.to(tl.int64)[:, None] * stride_y + n[None, :]
        is_there = is_pair[:, None] & (n < num_outputs)[None, :]
        tl.store(y + at, tl.trans(acc.to(y.dtype.element_ty)), mask=is_there)


_grouped = Launcher(grouped_kernel)


class Tile(NamedTuple):
    """Of a program: rows of W, columns at a time, and how it is compiled."""

    rows_w: int
    cols: int
    num_warps: int
    num_stages: int


def tile_for(rows: int, group: int, w_dtype: torch.dtype, x_dtype: torch.dtype, *, is_hopper: bool) -> Tile:
    """Of programs with so many rows of x; measured on an H100, elsewhere what stays in registers."""
    is_dense = w_dtype not in (torch.int32, torch.float8_e4m3fn)
    cols = 64 if group in (32, 64) or is_dense else 128
    if not is_hopper:
        return Tile(64, cols, 4 if rows <= 32 else 8, 3)
    if w_dtype == torch.int32:
        return Tile(128, cols, 4 if rows == 64 else 8, 4)
    if is_dense:
        return Tile(64 if rows <= 32 else 128, cols, 4 if rows <= 32 else 8, 4)
    if rows <= 32:
        return Tile(64, 128, 4, 6 if x_dtype == torch.float8_e4m3fn else 4)
    return Tile(128, 128, 4 if rows == 64 and x_dtype == torch.float8_e4m3fn else 8, 4)


def launch(
    x_MK: Tensor,
    x_scale: Tensor | None,
    stored: Tensor,
    w_scale: Tensor | None,
    w_zero_point: Tensor | None,
    slots: Tensor,
    expert_of_tile: Tensor,
    group: int,
    y_PN: Tensor,
    tile: Tile | None = None,
) -> None:
    """Write the product to y_PN by programs of a given shape."""
    num_pairs, num_outputs = y_PN.shape
    is_int4 = stored.dtype == torch.int32
    rows = len(slots) // len(expert_of_tile)
    tile = tile or tile_for(
        rows, group, stored.dtype, x_MK.dtype, is_hopper=capability(x_MK.device) == HOPPER
    )
    num_groups = w_scale.shape[2] if w_scale is not None and group else 1
    w = stored.view(torch.int8) if is_int4 else stored
    _grouped(
        (len(expert_of_tile), num_parts(num_outputs, tile.rows_w)),
        (
            y_PN, x_MK, w, x_scale, w_scale, w_zero_point, slots, expert_of_tile,
            num_pairs, num_pairs // len(x_MK), num_outputs, x_MK.shape[1], num_groups,
            w.stride(0), 0 if w_scale is None else w_scale.stride(0), x_MK.stride(0), y_PN.stride(0),
            0 if x_scale is None else x_scale.stride(0),
        ),
        (is_int4, group, tile.rows_w, rows, tile.cols, tile.num_stages),
        num_warps=tile.num_warps, early=False,
    )  # fmt: skip
