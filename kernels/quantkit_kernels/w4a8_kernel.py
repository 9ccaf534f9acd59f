"""`w4a8` on a GPU: INT4 in fragment order made 8-bit codes in registers, and multiplied by tiles.

    packed [BN / 16, BK / 64, 512] ─► W [BN, BK] ─► W · xᵀ ─► · s_w[n, g] ─► acc [BN, BM]        BK = 128, or 64

With a scale per row sums run over all of K; in groups each group's sum, exact in int32 or in a fresh accumulator, is
scaled and added in float32. Work is shared out by `stream_kernel`, as for 8-bit weights.
Bound: half a byte per weight up to about 120 rows; then multiplications, and in groups what scaling their sums takes.
Shape suffixes: M rows, N out_features, K in_features, G groups.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from quantkit_kernels import fragments_kernel as fragments
from quantkit_kernels.byte_tile_kernel import RASTER, Shape, prefetch
from quantkit_kernels.capability import num_multiprocessors, starts_early
from quantkit_kernels.stream_kernel import add_up, item_of, raster, share_of, tickets_of
from quantkit_kernels.triton_launch import Launcher, num_parts, power_above
from quantkit_kernels.w8a8_fp8 import aligned

AHEAD = 8  # blocks of 64 columns of each strip that are fetched while the kernel in front still makes x


@triton.jit
def _group_sum(w_NK, x_KM, IS_INT8: tl.constexpr):
    """Products of one group, float32."""
    return tl.dot(w_NK, x_KM, out_dtype=tl.int32 if IS_INT8 else tl.float32).to(tl.float32)


@triton.jit
def _codes(packed, zero_N, IS_INT8: tl.constexpr, STRIPS: tl.constexpr, BLOCKS: tl.constexpr):
    """W [N, K] as int8 or e4m3, less its zero points; times 16 or 2^-9, or with zero points int8 as it is."""
    if zero_N is not None:
        low, high = fragments.as_unsigned(packed)
    elif IS_INT8:
        low, high = fragments.as_int8(packed)
    else:
        low, high = fragments.as_e4m3(packed)
    w_NK = fragments.rows_of(low, high, STRIPS, BLOCKS)
    if zero_N is not None:
        zero_NK = tl.broadcast_to((zero_N + 8).to(tl.int8)[:, None], w_NK.shape)
        w_NK = fragments.less(w_NK, zero_NK)
        if not IS_INT8:
            w_NK = fragments.signed_as_e4m3(w_NK)
    return w_NK


@triton.jit
def _load_x(x, x_at, row, col, num_cols, FROM_MAPS: tl.constexpr, COLS: tl.constexpr):
    """xᵀ [COLS, BM] from a column on; beyond the last zeros."""
    if FROM_MAPS:
        x_KM = x.load([row, col]).T
    else:
        k = col + tl.arange(0, COLS)
        x_KM = tl.load(x_at + k[:, None], mask=k[:, None] < num_cols, other=0.0)
    return x_KM


@triton.jit
def _of_group(values, n, group, num_groups, num_outputs):
    """Scales or zero points of a group, from [N / 16, G, 16]."""
    at = (n // 16).to(tl.int64) * (num_groups * 16) + group * 16 + n % 16
    return tl.load(values + at, mask=(n < num_outputs) & (group < num_groups), other=0)


@triton.jit(
    do_not_specialize=["num_rows", "num_groups", "x_scale_step", "ahead"]
)  # one kernel for every batch
def w4a8_kernel(
    y, x, packed, x_scale, x_zero_point, w_scale, w_zero_point, w_row_sum, bias, partial, tickets,
    num_rows, num_outputs, num_cols, num_blocks, num_groups, stride_x, stride_y, x_scale_step, ahead,
    GROUP: tl.constexpr, IS_INT8: tl.constexpr, FROM_MAPS: tl.constexpr, EARLY: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, RASTER: tl.constexpr,
):  # fmt: skip
    """GROUP: columns per scale, or 0: one scale per row. x: a pointer, or with FROM_MAPS a tensor map of [BM, BK]."""
    STRIPS: tl.constexpr = BN // 16
    BLOCKS: tl.constexpr = BK // 64
    X_COLS: tl.constexpr = 32 if GROUP == 32 else BK
    ACC: tl.constexpr = tl.int32 if IS_INT8 and GROUP == 0 else tl.float32
    FACTOR: tl.constexpr = 1.0 if IS_INT8 and w_zero_point is not None else (1 / 16 if IS_INT8 else 512.0)
    pid = tl.program_id(0)
    num_programs = tl.num_programs(0)
    tiles_n, tiles_m, steps = tl.cdiv(num_outputs, BN), tl.cdiv(num_rows, BM), tl.cdiv(num_cols, BK)
    num_tiles = tiles_n * tiles_m
    waves, first, last, num_items = share_of(pid, num_programs, num_tiles, steps)
    if EARLY:
        gdc_launch_dependents()
        tile, start, end = item_of(0, pid, num_programs, waves, first, last, steps)
        tile_n, tile_m = raster(tile, tiles_n, tiles_m, RASTER)
        strip = tl.minimum(tile_n * STRIPS + tl.arange(0, STRIPS), tl.cdiv(num_outputs, 16) - 1).to(tl.int64)
        num_bytes = tl.minimum(num_blocks - start * BLOCKS, tl.minimum((end - start) * BLOCKS, ahead)) * 512
        prefetch(packed + (strip * num_blocks + start * BLOCKS) * 512, num_bytes)
        gdc_wait()
    for item in range(num_items):
        tile, start, end = item_of(item, pid, num_programs, waves, first, last, steps)
        tile_n, tile_m = raster(tile, tiles_n, tiles_m, RASTER)
        n = tile_n * BN + tl.arange(0, BN)
        m = tile_m * BM + tl.arange(0, BM)
        acc = tl.zeros((BN, BM), dtype=ACC)
        x_at = None
        if not FROM_MAPS:
            x_at = x + tl.minimum(m, num_rows - 1).to(tl.int64)[None, :] * stride_x
        for step in tl.range(start, end, num_stages=STAGES):
            bytes_NK = fragments.load_fragments(
                packed, tile_n * STRIPS, step * BLOCKS, tl.cdiv(num_outputs, 16), num_blocks, STRIPS, BLOCKS
            )
            x_KM = _load_x(x, x_at, tile_m * BM, step * BK, num_cols, FROM_MAPS, X_COLS)
            if GROUP == 0:
                w_NK = _codes(bytes_NK, None, IS_INT8, STRIPS, BLOCKS)
                if IS_INT8:
                    acc = tl.dot(w_NK, x_KM, acc, out_dtype=tl.int32)
                else:
                    acc += tl.dot(w_NK, x_KM)
            elif GROUP == 32:  # a half of a block each
                group = step * 2
                scale_N = _of_group(w_scale, n, group, num_groups, num_outputs).to(tl.float32)
                scale2_N = _of_group(w_scale, n, group + 1, num_groups, num_outputs).to(tl.float32)
                zero_N = None
                if w_zero_point is not None:
                    zero_N = _of_group(w_zero_point, n, group, num_groups, num_outputs)
                    zero2_N = _of_group(w_zero_point, n, group + 1, num_groups, num_outputs)
                    left_NK, _ = fragments.halves(_codes(bytes_NK, zero_N, IS_INT8, STRIPS, BLOCKS))
                    _, right_NK = fragments.halves(_codes(bytes_NK, zero2_N, IS_INT8, STRIPS, BLOCKS))
                else:
                    left_NK, right_NK = fragments.halves(_codes(bytes_NK, None, IS_INT8, STRIPS, BLOCKS))
                acc += _group_sum(left_NK, x_KM, IS_INT8) * scale_N[:, None]
                x_KM = _load_x(x, x_at, tile_m * BM, step * BK + 32, num_cols, FROM_MAPS, X_COLS)
                acc += _group_sum(right_NK, x_KM, IS_INT8) * scale2_N[:, None]
            else:
                scale_N = _of_group(w_scale, n, step, num_groups, num_outputs).to(tl.float32)
                zero_N = None
                if w_zero_point is not None:
                    zero_N = _of_group(w_zero_point, n, step, num_groups, num_outputs)
                w_NK = _codes(bytes_NK, zero_N, IS_INT8, STRIPS, BLOCKS)
                acc += _group_sum(w_NK, x_KM, IS_INT8) * scale_N[:, None]
        is_last = True
        if end - start < steps:
            acc, is_last = add_up(acc, partial, tickets, tile, start, pid, num_programs, num_tiles, steps)
        if is_last:
            y_NM = acc.to(tl.float32) * FACTOR
            if GROUP == 0:
                y_NM *= tl.load(w_scale + n, mask=n < num_outputs, other=0.0)[:, None]
            if x_zero_point is not None:
                zero_M = tl.load(x_zero_point + m * x_scale_step, mask=m < num_rows, other=0).to(tl.float32)
                sum_N = tl.load(w_row_sum + n, mask=n < num_outputs, other=0.0)
                y_NM -= sum_N[:, None] * zero_M[None, :]
            y_NM *= tl.load(x_scale + m * x_scale_step, mask=m < num_rows, other=0.0)[None, :]
            if bias is not None:
                y_NM += tl.load(bias + n, mask=n < num_outputs, other=0.0).to(tl.float32)[:, None]
            at = m.to(tl.int64)[:, None] * stride_y + n[None, :]
            is_there = (m < num_rows)[:, None] & (n < num_outputs)[None, :]
            tl.store(y + at, tl.trans(y_NM.to(y.dtype.element_ty)), mask=is_there)


_w4a8 = Launcher(w4a8_kernel)


def launch(
    codes_MK: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    packed: Tensor,
    w_scale: Tensor,
    w_zero_point: Tensor | None,
    w_row_sum_N: Tensor | None,
    bias_N: Tensor | None,
    group: int,
    y_MN: Tensor,
    shape: Shape | None = None,
) -> None:
    """Write the product to y_MN by programs of a given shape."""
    num_rows, num_outputs = y_MN.shape
    shape = shape or shape_for(num_rows, num_outputs, group, codes_MK.device)
    x_zero_point = None if x_zero_point is None else x_zero_point.contiguous()
    x, is_int8 = aligned(codes_MK), codes_MK.dtype == torch.int8
    num_cols, stride_x = x.shape[1], x.stride(0)
    tiles = num_parts(num_outputs, shape.rows_w) * num_parts(num_rows, shape.rows_x)
    programs = min(shape.programs or tiles, tiles * num_parts(num_cols, shape.cols))
    is_cut = tiles % programs != 0
    size = 2 * programs * shape.rows_w * shape.rows_x if is_cut else 1
    partial = torch.empty(
        size, dtype=torch.int32 if is_int8 and not group else torch.float32, device=x.device
    )
    tickets = tickets_of(codes_MK.device) if is_cut else partial.view(torch.int32)
    if shape.maps:
        x = TensorDescriptor(x, x.shape, x.stride(), [shape.rows_x, 32 if group == 32 else shape.cols])
    _w4a8(
        (programs, 1),
        (
            y_MN, x, packed.view(torch.int8), x_scale.contiguous(), x_zero_point, w_scale, w_zero_point, w_row_sum_N,
            bias_N, partial, tickets, num_rows, num_outputs, num_cols, packed.shape[1],
            w_scale.shape[1] if group else 1, stride_x, y_MN.stride(0), 1 if x_scale.numel() > 1 else 0, AHEAD,
        ),
        (
            group, is_int8, shape.maps, shape.maps, shape.rows_w, shape.rows_x, shape.cols, shape.num_stages, RASTER,
        ),
        num_warps=shape.num_warps, early=shape.maps,
    )  # fmt: skip


def shape_for(num_rows: int, num_outputs: int, group: int, device: torch.device) -> Shape:
    """Of the programs that multiply so many rows."""
    maps = starts_early(device)
    num_sms = num_multiprocessors(device)
    rows = min(max(power_above(num_rows), 32), 128)
    tiles = num_parts(num_outputs, 64) * num_parts(num_rows, rows)
    programs = 2 * num_sms if tiles < num_sms else 0
    return Shape(64, rows, 128 if group in (0, 128) else 64, 4, 4 if maps else 3, maps, programs=programs)


def fixed_shape(group: int, device: torch.device) -> Shape:
    """One for any number of rows and whole tiles: each element of y is the same sum, in the same order."""
    maps = starts_early(device)
    return Shape(64, 64, 128 if group in (0, 128) else 64, 4, 4 if maps else 3, maps)
