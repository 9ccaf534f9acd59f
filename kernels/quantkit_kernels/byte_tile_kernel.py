"""Products of 8-bit codes by tiles: INT8 or FP8 e4m3 weights with activations of the same kind.

    y[m, n] = (Σ_k w[n, k] · x[m, k]  −  z[m] · Σ_k w[n, k]) · s_w[n] · s_x[m] + bias[n]        scales per row
    y[m, n] = Σ_b (Σ_{k in b} w[n, k] · x[m, k]) · s_w[n / 128, b] · s_x[m, b] + bias[n]        blocks of 128

    W [BN, BK] ─┐                                     weights on the left: their rows fill the 64 of a tensor core's
                ├─► acc [BN, BM] ─► scales ─► yᵀ      tile even when x has few
    x [BM, BK]ᵀ ┘

INT8 sums are exact in int32. The tensor core's own sum of FP8 products keeps 14 bits: every 128 columns it goes to
float32. Work is shared out by `stream_kernel`.

Bound: a byte per weight up to about 240 rows, then multiplications.
Shape suffixes: M rows, N out_features, K in_features.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from quantkit_kernels.capability import starts_early
from quantkit_kernels.stream_kernel import add_up, item_of, raster, share_of, tickets_of
from quantkit_kernels.triton_launch import Launcher, num_parts

BLOCK = tl.constexpr(128)
RASTER = 8
HOPPER_SHARED = 227 << 10  # bytes of a block; from compute capability 12.0 on there are 99 KB
AHEAD = 512  # bytes of each row of W that are fetched while the kernel in front still makes x


@triton.jit(do_not_specialize=["num_rows", "x_scale_step", "ahead"])  # one kernel for every batch
def byte_tile_kernel(
    y, x, w, w_codes, x_scale, x_zero_point, w_scale, w_code_sum, bias, partial, tickets,
    num_rows, num_outputs, num_cols, stride_x, stride_w, stride_y, x_scale_step, ahead,
    IN_BLOCKS: tl.constexpr, FROM_MAPS: tl.constexpr, EVEN: tl.constexpr, EARLY: tl.constexpr, X_LEFT: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """x, w: pointers, or with FROM_MAPS tensor maps of [BM, BK] and [BN, BK]. x_scale_step: between rows, or 0."""
    IS_INT8: tl.constexpr = w.dtype.element_ty == tl.int8 if not FROM_MAPS else w.dtype == tl.int8
    ACC: tl.constexpr = tl.int32 if IS_INT8 else tl.float32
    pid = tl.program_id(0)
    num_programs = tl.num_programs(0)
    tiles_n, tiles_m, steps = tl.cdiv(num_outputs, BN), tl.cdiv(num_rows, BM), tl.cdiv(num_cols, BK)
    num_tiles = tiles_n * tiles_m
    waves, first, last, num_items = share_of(pid, num_programs, num_tiles, steps)
    if EARLY:
        tile, start, end = item_of(0, pid, num_programs, waves, first, last, steps)
        tile_n, tile_m = raster(tile, tiles_n, tiles_m, GROUP)
        n = tl.minimum(tile_n * BN + tl.arange(0, BN), num_outputs - 1)
        gdc_launch_dependents()
        row_bytes = tl.minimum((end - start) * BK, tl.minimum(ahead, num_cols - start * BK))
        prefetch(w_codes + n.to(tl.int64) * stride_w + start * BK, row_bytes)
        gdc_wait()
    for item in range(num_items):
        tile, start, end = item_of(item, pid, num_programs, waves, first, last, steps)
        tile_n, tile_m = raster(tile, tiles_n, tiles_m, GROUP)
        n = tile_n * BN + tl.arange(0, BN)
        m = tile_m * BM + tl.arange(0, BM)
        acc = tl.zeros((BM, BN) if X_LEFT else (BN, BM), dtype=ACC)
        if not FROM_MAPS:  # rows beyond the last are read as the last, and not stored
            w_at = w + tl.minimum(n, num_outputs - 1).to(tl.int64)[:, None] * stride_w
            x_at = x + tl.minimum(m, num_rows - 1).to(tl.int64)[None, :] * stride_x
        for step in tl.range(start, end, num_stages=STAGES):
            if FROM_MAPS:
                w_NK = w.load([tile_n * BN, step * BK])
                x_KM = x.load([tile_m * BM, step * BK]).T
            else:
                k = step * BK + tl.arange(0, BK)
                if EVEN:
                    w_NK = tl.load(w_at + k[None, :])
                    x_KM = tl.load(x_at + k[:, None])
                else:
                    w_NK = tl.load(w_at + k[None, :], mask=k[None, :] < num_cols, other=0.0)
                    x_KM = tl.load(x_at + k[:, None], mask=k[:, None] < num_cols, other=0.0)
            if IN_BLOCKS:
                scale_w = tl.load(w_scale + (tile_n * BN // BLOCK) * tl.cdiv(num_cols, BLOCK) + step)
                scale_M = tl.load(
                    x_scale + m.to(tl.int64) * x_scale_step + step, mask=m < num_rows, other=0.0
                )
                acc += tl.dot(w_NK, x_KM) * (scale_M * scale_w)[None, :]
            elif X_LEFT:
                if IS_INT8:
                    acc = tl.dot(x_KM.T, w_NK.T, acc, out_dtype=tl.int32)
                else:
                    acc += tl.dot(x_KM.T, w_NK.T)
            elif IS_INT8:
                acc = tl.dot(w_NK, x_KM, acc, out_dtype=tl.int32)
            else:
                acc += tl.dot(w_NK, x_KM)
        is_last = True
        if end - start < steps:
            acc, is_last = add_up(acc, partial, tickets, tile, start, pid, num_programs, num_tiles, steps)
        if is_last:
            sum_NM = acc.T if X_LEFT else acc
            if x_zero_point is not None:
                zero_M = tl.load(x_zero_point + m * x_scale_step, mask=m < num_rows, other=0).to(tl.int32)
                code_sum_N = tl.load(w_code_sum + n, mask=n < num_outputs, other=0)
                sum_NM -= code_sum_N[:, None] * zero_M[None, :]
            y_NM = sum_NM.to(tl.float32)
            if not IN_BLOCKS:
                scale_M = tl.load(x_scale + m * x_scale_step, mask=m < num_rows, other=0.0)
                scale_N = tl.load(w_scale + n, mask=n < num_outputs, other=0.0)
                y_NM = y_NM * scale_N[:, None] * scale_M[None, :]
            if bias is not None:
                y_NM += tl.load(bias + n, mask=n < num_outputs, other=0.0).to(tl.float32)[:, None]
            y_MN = tl.trans(y_NM.to(y.dtype.element_ty))
            at = m.to(tl.int64)[:, None] * stride_y + n[None, :]
            tl.store(y + at, y_MN, mask=(m < num_rows)[:, None] & (n < num_outputs)[None, :])


@triton.jit
def prefetch(at, num_bytes):
    """Rows from `at` on to the L2 cache: weights, while the kernel in front still makes x."""
    tl.inline_asm_elementwise(
        "{ cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0; }", "=r,l,r", [at, num_bytes],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


_byte_tile = Launcher(byte_tile_kernel)


class Shape(NamedTuple):
    """Of a program: rows of W and of x, columns at a time, how it is compiled, and how many there are.

    maps: read through tensor maps (Hopper and newer), and start before the kernel in front has ended. x_left: x on the
    left, for few rows of W, so that every multiprocessor has some. programs: 0: one per tile.
    """

    rows_w: int
    rows_x: int
    cols: int
    num_warps: int
    num_stages: int
    maps: bool
    x_left: bool = False
    programs: int = 0


def multiply(
    codes_MK: Tensor,
    x_scale: Tensor,
    w_codes_NK: Tensor,
    w_scale: Tensor,
    y_MN: Tensor,
    shape: Shape | None = None,
    *,
    bias_N: Tensor | None = None,
    zero_point: Tensor | None = None,
    code_sum_N: Tensor | None = None,
) -> None:
    """Write the product to y [M, N]. Columns of both codes are contiguous and a multiple of 16."""
    num_rows, num_cols = codes_MK.shape
    num_outputs, in_blocks = y_MN.shape[1], w_scale.ndim == 2
    if num_rows == 0:
        return
    shape = shape or shape_for(num_rows, num_outputs, codes_MK.dtype, codes_MK.device, in_blocks=in_blocks)
    tiles = num_parts(num_outputs, shape.rows_w) * num_parts(num_rows, shape.rows_x)
    programs = min(shape.programs or tiles, tiles * num_parts(num_cols, shape.cols))
    is_cut = tiles % programs != 0
    kind = torch.int32 if codes_MK.dtype == torch.int8 else torch.float32
    size = 2 * programs * shape.rows_w * shape.rows_x if is_cut else 1
    partial = torch.empty(size, dtype=kind, device=codes_MK.device)
    tickets = tickets_of(codes_MK.device) if is_cut else partial.view(torch.int32)
    x, w = codes_MK, w_codes_NK
    if shape.maps:
        x = TensorDescriptor(codes_MK, codes_MK.shape, codes_MK.stride(), [shape.rows_x, shape.cols])
        w = TensorDescriptor(w_codes_NK, w_codes_NK.shape, w_codes_NK.stride(), [shape.rows_w, shape.cols])
    x_scale = x_scale.contiguous()
    x_scale_step = x_scale.shape[1] if x_scale.shape[0] > 1 else 0
    zero_point = None if zero_point is None else zero_point.contiguous()
    _byte_tile(
        (programs, 1),
        (
            y_MN, x, w, w_codes_NK, x_scale, zero_point, w_scale, code_sum_N, bias_N, partial,
            tickets, num_rows, num_outputs, num_cols, codes_MK.stride(0), w_codes_NK.stride(0),
            y_MN.stride(0), x_scale_step, AHEAD,
        ),
        (
            in_blocks, shape.maps, num_cols % shape.cols == 0, shape.maps, shape.x_left,
            shape.rows_w, shape.rows_x, shape.cols, shape.num_stages, RASTER,
        ),
        num_warps=shape.num_warps, early=shape.maps,
    )  # fmt: skip


def shape_for(
    num_rows: int, num_outputs: int, dtype: torch.dtype, device: torch.device, *, in_blocks: bool = False
) -> Shape:
    """Of the programs that multiply so many rows; measured on an H100."""
    maps = starts_early(device)
    properties: Any = torch.cuda.get_device_properties(device)  # Any: torch's stub does not have all of them
    num_sms = properties.multi_processor_count
    if not maps or properties.shared_memory_per_block_optin < HOPPER_SHARED:
        return Shape(64, 32 if num_rows <= 32 else 64, 128, 4, 3, maps)
    if num_rows <= 64:
        few = _few_int8 if dtype == torch.int8 else _few_in_blocks if in_blocks else _few_fp8
        return few(32 if num_rows <= 32 else 64, num_parts(num_outputs, 64), num_sms)
    if dtype != torch.int8:
        return Shape(128, 64, 128, 4, 4, maps)
    for rows_w, rows_x, num_warps, num_stages in ((64, 64, 4, 6), (64, 128, 4, 4), (128, 128, 8, 3)):
        if (
            num_parts(num_outputs, rows_w) * num_parts(num_rows, rows_x) <= num_sms
        ):  # the smallest that fit at once
            return Shape(rows_w, rows_x, 256, num_warps, num_stages, maps)
    return Shape(128, 128, 128, 4, 3, maps)


@functools.cache
def fixed_shape(device: torch.device) -> Shape:
    """One for any number of rows and whole tiles: each element of y is the same sum, in the same order."""
    maps = starts_early(device)
    properties: Any = torch.cuda.get_device_properties(device)
    has_room = maps and properties.shared_memory_per_block_optin >= HOPPER_SHARED
    return Shape(64, 64, 128, 4, 8 if has_room else 3, maps)


# Up to 64 rows what counts is how many bytes of W are on their way: all of a multiprocessor's shared memory, and every
# multiprocessor busy. FP8 takes 128 columns at a time, after which its sums go to float32.


def _few_int8(rows: int, tiles: int, num_sms: int) -> Shape:
    if tiles > num_sms:
        return Shape(64, 32, 256, 4, 4, True) if rows == 32 else Shape(128, 64, 128, 4, 4, True)
    if rows == 64 and tiles <= num_sms // 2:
        return Shape(32, 64, 256, 4, 6, True, x_left=True)
    return Shape(64, rows, 256, 4, 6 if rows == 32 else 5, True)


def _few_fp8(rows: int, tiles: int, num_sms: int) -> Shape:
    if tiles > num_sms:
        return Shape(128, rows, 128, 4, 4, True)
    if rows == 64 and tiles <= num_sms // 2:
        return Shape(32, 64, 128, 4, 12, True, x_left=True)
    return Shape(64, rows, 128, 4, 11 if rows == 32 else 8, True)


def _few_in_blocks(rows: int, tiles: int, num_sms: int) -> Shape:
    if tiles > num_sms:
        return Shape(128, rows, 128, 4, 4, True)
    if tiles <= num_sms // 2:
        return Shape(64, rows, 128, 4, 8, True, programs=num_sms)
    return Shape(64, rows, 128, 4, 4, True)
