"""Products for experts: rows sorted by expert, tiles of one expert each, in one launch.

    y[p, n] = Σ_k x[row(p), k] · w[expert(p), n, k]     p: a pair of token and expert; row(p) = p / S, or p

    program (tile, n): W [BN, BK] of the tile's expert · x [BM, BK]ᵀ, rows of x gathered by `slots`; a tile that nobody
    needs has expert -1 and ends at once. Rows of y are those of pairs, wherever the tile was.

    weights                        activations          where the scale goes
    INT4 in fragment order         bf16, fp16           groups of 32, 64, 128: each group's sum; per row: the end
    FP8 e4m3 rows                  bf16, fp16           128-blocks: each block's sum; per row: the end
    FP8 e4m3 rows                  FP8, scale per token, or per token and 128 columns with blocks

Bound: the bytes of the experts that got a token; with many tokens each, multiplications.
Shape suffixes: E experts, N out_features, K in_features, P pairs, G groups, M rows of a tile.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit_kernels import fragments, skinny, w8a8_fp8
from quantkit_kernels.repack import BLOCK_COLUMNS, STRIP_ROWS, from_fragments
from quantkit_kernels.weight import LinearWeight

BLOCK = 128
MIN_FP8_CAPABILITY = (8, 9)


class ExpertWeight(NamedTuple):
    """Weights of all experts.

    stored: INT4 fragments, int32 [E, N / 16, K / 64, 32, 4], or float8_e4m3fn [E, N, K], columns padded to 16. scale:
    [E, N / 16, G, 16] in groups of INT4, float32 [E, N / 128, K / 128] in blocks of FP8, float32 [E, N] per row.
    zero_point: int8 like scale. group: 0: a scale per row.
    """

    stored: Tensor
    scale: Tensor
    zero_point: Tensor | None
    shape: tuple[int, int]
    group: int


def prepare(weights: list[LinearWeight]) -> ExpertWeight:
    """Lay out and stack weights of one shape and format."""
    if weights[0].bits == 4:
        laid = [skinny.prepare(weight) for weight in weights]
        zero_points = [w.zero_point for w in laid if w.zero_point is not None]
        stacked = torch.stack([w.stored for w in laid]), torch.stack([w.scale for w in laid if w.scale is not None])
        return ExpertWeight(*stacked, torch.stack(zero_points) if zero_points else None, laid[0].shape, laid[0].group_size)
    rows = [w8a8_fp8.prepare(weight) for weight in weights]
    n, k = rows[0].shape
    group = BLOCK if rows[0].in_blocks else 0
    scale = torch.stack([w.scale if group else w.scale[:n] for w in rows])
    stored = torch.stack([w.codes_NK[:n].view(torch.int8) for w in rows]).view(torch.float8_e4m3fn)
    return ExpertWeight(stored, scale, None, (n, k), group)


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
    num_pairs, pairs_per_row, num_outputs, num_cols, num_groups, stride_w, stride_x, stride_y, x_scale_step,
    IS_INT4: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """pairs_per_row: those that share a row of x. stride_w: of an expert, in bytes. num_cols: of x; w has no fewer."""
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
        scales_of_expert = tl.cdiv(num_outputs, 16) * 16 * num_groups
        num_blocks = tl.cdiv(num_cols, 64)
        cols_w = tl.cdiv(num_cols, 16) * 16
        if not IS_INT4:
            scales_of_expert = num_outputs
            if GROUP > 0:
                scales_of_expert = tl.cdiv(num_outputs, GROUP) * num_groups
            w_at = w + tl.minimum(n, num_outputs - 1).to(tl.int64)[:, None] * cols_w
        w_scale += expert * scales_of_expert
        if w_zero_point is not None:
            w_zero_point += expert * scales_of_expert
        acc = tl.zeros((BN, BM), dtype=tl.float32)
        for step in range(0, tl.cdiv(num_cols, BK)):
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
            acc *= tl.load(w_scale + n, mask=n < num_outputs, other=0.0)[:, None]
            if x_scale is not None:
                acc *= tl.load(x_scale + row * x_scale_step, mask=is_pair, other=0.0)[None, :]
        at = slot.to(tl.int64)[:, None] * stride_y + n[None, :]
        is_there = is_pair[:, None] & (n < num_outputs)[None, :]
        tl.store(y + at, tl.trans(acc.to(y.dtype.element_ty)), mask=is_there)


def rows_for(num_pairs: int, num_experts: int) -> int:
    """Rows of a tile: about what an expert gets, so that its weights are read once."""
    return min(max(triton.next_power_of_2(triton.cdiv(num_pairs, num_experts)), 16), 128)


def multiply(
    x: Tensor,
    x_scale: Tensor | None,
    weight: ExpertWeight,
    slots: Tensor,
    expert_of_tile: Tensor,
    num_pairs: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """`moe_linear` with prepared weights."""
    stored, scale, zero_point, (n, _), group = weight
    return moe_linear(x, x_scale, stored, scale, zero_point, slots, expert_of_tile, num_pairs, n, group, out_dtype)


@torch.library.custom_op("quantkit::moe_linear", mutates_args=(), device_types="cuda")
def moe_linear(
    x_MK: Tensor,
    x_scale: Tensor | None,
    stored: Tensor,
    w_scale: Tensor,
    w_zero_point: Tensor | None,
    slots: Tensor,
    expert_of_tile: Tensor,
    num_pairs: int,
    num_outputs: int,
    group: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """Each pair's row times its expert's weight, [P, N] in out_dtype.

    x_MK: a row per pair, or per token (P / rows pairs share it), columns contiguous; bf16 or fp16, or with FP8 weights
    float8_e4m3fn with x_scale, float32 [rows, 1] or [rows, K / 128]. stored, w_scale, w_zero_point, group: of an
    `ExpertWeight`. slots, expert_of_tile: of `sort_by_expert`.
    """
    _check(x_MK, x_scale, stored, w_scale, slots, expert_of_tile, num_pairs, num_outputs, group)
    if stored.dtype != torch.int32 and torch.cuda.get_device_capability(x_MK.device) < MIN_FP8_CAPABILITY:
        return plain(
            x_MK, x_scale, stored, w_scale, w_zero_point, slots, expert_of_tile, num_pairs, num_outputs, group, out_dtype
        )
    y_PN = torch.empty(num_pairs, num_outputs, dtype=out_dtype, device=x_MK.device)
    if num_pairs > 0:
        rows = len(slots) // len(expert_of_tile)
        launch(x_MK, x_scale, stored, w_scale, w_zero_point, slots, expert_of_tile, group, y_PN, tile_for(rows, group))
    return y_PN


@moe_linear.register_fake
def _(
    x_MK: Tensor,
    x_scale: Tensor | None,
    stored: Tensor,
    w_scale: Tensor,
    w_zero_point: Tensor | None,
    slots: Tensor,
    expert_of_tile: Tensor,
    num_pairs: int,
    num_outputs: int,
    group: int,
    out_dtype: torch.dtype,
) -> Tensor:
    return x_MK.new_empty(num_pairs, num_outputs, dtype=out_dtype)


@moe_linear.register_kernel("cpu")
def plain(
    x_MK: Tensor,
    x_scale: Tensor | None,
    stored: Tensor,
    w_scale: Tensor,
    w_zero_point: Tensor | None,
    slots: Tensor,
    expert_of_tile: Tensor,
    num_pairs: int,
    num_outputs: int,
    group: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """`moe_linear` in plain torch: expert by expert, weights dequantized, in float32."""
    _check(x_MK, x_scale, stored, w_scale, slots, expert_of_tile, num_pairs, num_outputs, group)
    num_cols = x_MK.shape[1]
    x = x_MK.float()
    if x_scale is not None:
        x = x * (x_scale.repeat_interleave(BLOCK, dim=1)[:, :num_cols] if group else x_scale)
    y_PN = torch.empty(num_pairs, num_outputs, dtype=out_dtype, device=x.device)
    pairs_of_tile = slots.view(len(expert_of_tile), -1)
    for expert in expert_of_tile.unique().tolist():
        if expert >= 0:
            pairs = pairs_of_tile[expert_of_tile == expert].flatten().long()
            pairs = pairs[pairs < num_pairs]
            zero_point = None if w_zero_point is None else w_zero_point[expert]
            w_NK = dequantized(stored[expert], w_scale[expert], zero_point, num_outputs, num_cols, group)
            y_PN[pairs] = (x[pairs // (num_pairs // len(x))] @ w_NK.T).to(out_dtype)
    return y_PN


def dequantized(
    stored: Tensor, scale: Tensor, zero_point: Tensor | None, num_rows: int, num_cols: int, group: int
) -> Tensor:
    """One expert's weight, float32 [N, K]."""
    if stored.dtype != torch.int32:
        if group:
            scale = scale.repeat_interleave(group, dim=0)[:num_rows].repeat_interleave(group, dim=1)[:, :num_cols]
        return stored[:, :num_cols].float() * (scale if group else scale[:, None])
    w_NK = from_fragments(stored, num_rows, num_cols).float()
    if not group:
        return w_NK * scale[:, None]
    of_row = torch.arange(num_rows, device=scale.device)
    of_col = torch.arange(num_cols, device=scale.device) // group
    at = (of_row // STRIP_ROWS)[:, None], of_col[None, :], (of_row % STRIP_ROWS)[:, None]
    return (w_NK if zero_point is None else w_NK - zero_point[at].float()) * scale[at].float()


class Tile(NamedTuple):
    """Of a program: rows of W, columns at a time, and how it is compiled."""

    rows_w: int
    cols: int
    num_warps: int
    num_stages: int


def tile_for(rows: int, group: int) -> Tile:
    """Of programs with so many rows of x."""
    cols = 64 if group in (32, 64) else 128
    return Tile(64 if rows >= 64 else 128, cols, 4, 4 if rows < 128 else 3)


def launch(
    x_MK: Tensor,
    x_scale: Tensor | None,
    stored: Tensor,
    w_scale: Tensor,
    w_zero_point: Tensor | None,
    slots: Tensor,
    expert_of_tile: Tensor,
    group: int,
    y_PN: Tensor,
    tile: Tile,
) -> None:
    """Write the product to y_PN by programs of a given shape."""
    num_pairs, num_outputs = y_PN.shape
    is_int4 = stored.dtype == torch.int32
    rows = len(slots) // len(expert_of_tile)
    num_groups = w_scale.shape[2] if group else 1
    w = stored.view(torch.int8) if is_int4 else stored
    grouped_kernel[(len(expert_of_tile), triton.cdiv(num_outputs, tile.rows_w))](
        y_PN, x_MK, w, x_scale, w_scale, w_zero_point, slots, expert_of_tile,
        num_pairs, num_pairs // len(x_MK), num_outputs, x_MK.shape[1], num_groups, w.stride(0), x_MK.stride(0), y_PN.stride(0),
        0 if x_scale is None else x_scale.stride(0),
        is_int4, group, tile.rows_w, rows, tile.cols,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def _check(
    x_MK: Tensor,
    x_scale: Tensor | None,
    stored: Tensor,
    w_scale: Tensor,
    slots: Tensor,
    expert_of_tile: Tensor,
    num_pairs: int,
    num_outputs: int,
    group: int,
) -> None:
    num_rows, num_cols = x_MK.shape
    is_int4, is_codes = stored.dtype == torch.int32, x_MK.dtype == torch.float8_e4m3fn
    assert is_int4 or stored.dtype == torch.float8_e4m3fn, f"weights of {stored.dtype}"
    assert x_MK.dtype in (torch.bfloat16, torch.float16) or (is_codes and not is_int4), f"x of {x_MK.dtype}"
    assert (x_scale is not None) == is_codes, "FP8 activations come with scales, others without"
    assert x_MK.stride(1) == 1 and stored.is_contiguous(), "columns have to be next to each other"
    assert num_rows > 0 and num_pairs % num_rows == 0, f"{num_pairs} pairs for {num_rows} rows"
    assert len(slots) % len(expert_of_tile) == 0, f"{len(slots)} slots in {len(expert_of_tile)} tiles"
    expected = (-(-num_outputs // STRIP_ROWS), -(-num_cols // BLOCK_COLUMNS), 32, 4)
    expected = expected if is_int4 else (num_outputs, -(-num_cols // 16) * 16)
    assert tuple(stored.shape[1:]) == expected, f"weights {tuple(stored.shape)}, not [E, {expected}]"
    assert group in ((0, 32, 64, 128) if is_int4 else (0, BLOCK)), f"groups of {group} columns"
    assert w_scale.ndim == (2 if not group else 4 if is_int4 else 3), f"scales {tuple(w_scale.shape)}"
