"""`scale_search` on a GPU: every candidate is judged while the tile stays in registers.

    a program:   TILES tiles  × SIZE elements     one read of the weights, two numbers written per tile

Bound: a dozen operations per weight and candidate, of which there are 10 to 18; reading takes a tenth of that.
Shape suffixes: T tiles, S elements of a tile, P periods of the importance.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit_kernels.operators import on_its_device
from quantkit_kernels.rounding import E4M3_MAX, power_below, round_bfloat16, round_e4m3, round_even
from quantkit_kernels.scale_search import GRIDS, Candidates, supports

SYMMETRIC, EITHER_SIGN, ASYMMETRIC, E4M3 = (tl.constexpr(number) for number in range(4))
ROUND_TO = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
FLOAT16, BFLOAT16 = tl.constexpr(1), tl.constexpr(2)
PROGRAM_ELEMENTS = 1 << 12
SMALLEST_NORMAL = tl.constexpr(1.1754943508222875e-38)
ZERO_TILE_SCALE = tl.constexpr(1.1920928955078125e-07)


@triton.jit
def _round_scale(scale, ROUND_TO: tl.constexpr):
    """The scale in its dtype on disk, as float32; what underflows becomes the smallest number."""
    smallest = 5.9604644775390625e-08 if ROUND_TO == FLOAT16 else SMALLEST_NORMAL
    scale = tl.where(tl.abs(scale) < smallest, smallest, scale)
    if ROUND_TO == FLOAT16:
        scale = scale.to(tl.float16).to(tl.float32)
    if ROUND_TO == BFLOAT16:
        scale = round_bfloat16(scale)
    return scale


@triton.jit
def _judge(
    ratio_T, base_T, unit_T, low_T, tiles_TS, importance_TS, qmin, qmax,
    GRID: tl.constexpr, ROUND_TO: tl.constexpr, HAS_IMPORTANCE: tl.constexpr,
):  # fmt: skip
    """The candidate at a ratio: its error, scale and zero point. tiles_TS: in units of unit_T."""
    scale_T = _round_scale(base_T * ratio_T, ROUND_TO)
    zero_point_T = tl.zeros_like(scale_T)
    if GRID == ASYMMETRIC:
        zero_point_T = qmin - tl.div_rn(low_T * ratio_T, scale_T)
        zero_point_T = round_even(tl.minimum(tl.maximum(zero_point_T, qmin), qmax))
    step_T = tl.div_rn(scale_T, unit_T)
    code_TS = tiles_TS * tl.div_rn(1.0, step_T)[:, None]
    if GRID == E4M3:
        code_TS = round_e4m3(tl.minimum(tl.maximum(code_TS, qmin), qmax))
    else:
        lowest_T, highest_T = qmin - zero_point_T, qmax - zero_point_T
        code_TS = round_even(tl.minimum(tl.maximum(code_TS, lowest_T[:, None]), highest_T[:, None]))
    error_TS = code_TS * step_T[:, None] - tiles_TS
    square_TS = error_TS * error_TS
    if HAS_IMPORTANCE:
        square_TS *= importance_TS
    else:
        square_TS *= tl.sqrt(tl.abs(error_TS))
    return tl.sum(square_TS, axis=1), scale_T, zero_point_T


@triton.jit
def scale_search_kernel(
    tiles, importance, ratios, steps, scales, zero_points, num_tiles, period, half_range, qmin, qmax,
    NUM_RATIOS: tl.constexpr, NUM_STEPS: tl.constexpr, NUM_ELEMENTS: tl.constexpr, GRID: tl.constexpr,
    ROUND_TO: tl.constexpr, HAS_IMPORTANCE: tl.constexpr, TILES: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """tiles: [T, NUM_ELEMENTS] contiguous. scales: float32 [T]. zero_points: int8 [T]."""
    tile = tl.program_id(0).to(tl.int64) * TILES + tl.arange(0, TILES)
    element = tl.arange(0, SIZE)
    is_there = (tile < num_tiles)[:, None] & (element < NUM_ELEMENTS)[None, :]
    at = tile[:, None] * NUM_ELEMENTS + element[None, :]
    tiles_TS = tl.load(tiles + at, mask=is_there, other=0.0).to(tl.float32)
    low_T = tl.minimum(tl.min(tiles_TS, axis=1), 0.0)
    high_T = tl.maximum(tl.max(tiles_TS, axis=1), 0.0)
    if GRID == ASYMMETRIC:
        base_T = tl.div_rn(high_T - low_T, qmax - qmin)
    else:
        base_T = tl.div_rn(tl.maximum(high_T, -low_T), half_range + tl.zeros_like(high_T))
    base_T = tl.where(base_T == 0.0, ZERO_TILE_SCALE, base_T)
    # a power of two, whose inverse is exact; errors of weights as they are would leave float32 from 1e15 on
    unit_T = tl.maximum(power_below(base_T) * 2.0, SMALLEST_NORMAL)
    if GRID == EITHER_SIGN:
        base_T = tl.where(high_T > -low_T, -base_T, base_T)
    tiles_TS *= tl.div_rn(1.0, unit_T)[:, None]
    importance_TS = tiles_TS
    if HAS_IMPORTANCE:
        at = (tile % period)[:, None] * NUM_ELEMENTS + element[None, :]
        importance_TS = tl.load(importance + at, mask=is_there, other=0.0)

    best_error_T = tl.full((TILES,), float("inf"), dtype=tl.float32)
    best_ratio_T = tl.zeros((TILES,), dtype=tl.float32)
    best_scale_T = tl.zeros((TILES,), dtype=tl.float32)
    best_zero_point_T = tl.zeros((TILES,), dtype=tl.float32)
    for number in range(NUM_RATIOS + NUM_STEPS):
        if number < NUM_RATIOS:
            ratio_T = tl.zeros_like(base_T) + tl.load(ratios + number)
        else:
            ratio_T = best_ratio_T + tl.load(steps + number - NUM_RATIOS)
        error_T, scale_T, zero_point_T = _judge(
            ratio_T,
            base_T,
            unit_T,
            low_T,
            tiles_TS,
            importance_TS,
            qmin,
            qmax,
            GRID,
            ROUND_TO,
            HAS_IMPORTANCE,
        )
        is_better_T = error_T < best_error_T  # ties keep the earlier one
        best_error_T = tl.where(is_better_T, error_T, best_error_T)
        best_ratio_T = tl.where(is_better_T, ratio_T, best_ratio_T)
        best_scale_T = tl.where(is_better_T, scale_T, best_scale_T)
        best_zero_point_T = tl.where(is_better_T, zero_point_T, best_zero_point_T)
    tl.store(scales + tile, best_scale_T, mask=tile < num_tiles)
    if GRID == ASYMMETRIC:
        tl.store(zero_points + tile, best_zero_point_T.to(tl.int8), mask=tile < num_tiles)


def program_shape(size: int) -> tuple[int, int]:
    """Tiles and warps of a program for tiles of `size` elements, a power of two: 32 to 64 weights per thread."""
    return max(1, PROGRAM_ELEMENTS // size), max(4, size // 2048)


@on_its_device
def launch(
    tiles_TS: Tensor,
    importance_PS: Tensor | None,
    candidates: Candidates,
    grid: str,
    qmin: int,
    qmax: int,
    scale_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`scale_search` without the operator around it."""
    num_tiles, num_elements = tiles_TS.shape
    assert supports(num_elements), f"a tile of {num_elements} elements"
    tiles_TS = tiles_TS.contiguous()
    size = triton.next_power_of_2(num_elements)
    program_tiles, num_warps = program_shape(size)
    device = tiles_TS.device
    ratios, steps = (_constants(values, device) for values in candidates)
    scale_T = torch.empty(num_tiles, dtype=torch.float32, device=device)
    zero_point_T = torch.zeros(num_tiles, dtype=torch.int8, device=device)
    importance = tiles_TS if importance_PS is None else importance_PS.float().contiguous()
    is_e4m3 = grid == "e4m3"
    low, high = (-E4M3_MAX.value, E4M3_MAX.value) if is_e4m3 else (float(qmin), float(qmax))
    scale_search_kernel[(triton.cdiv(num_tiles, program_tiles),)](
        tiles_TS, importance, ratios, steps, scale_T, zero_point_T, num_tiles, len(importance), (high - low) / 2,
        low, high, len(candidates.ratios), len(candidates.steps), num_elements, GRIDS.index(grid),
        ROUND_TO[scale_dtype], importance_PS is not None, program_tiles, size,
        num_warps=num_warps,
    )  # fmt: skip
    return scale_T.to(scale_dtype), zero_point_T


@cache
def _constants(values: tuple[float, ...], device: torch.device) -> Tensor:
    """On the device once, because copying them waits for it."""
    return torch.tensor(values, dtype=torch.float32, device=device)
