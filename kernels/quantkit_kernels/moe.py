"""Products for experts: rows sorted by expert, tiles of one expert each, in one launch.

    y[p, n] = Σ_k x[row(p), k] · w[expert(p), n, k]     p: a pair of token and expert; row(p) = p / S, or p

Rows of y are those of pairs, wherever the tile was; `moe_routing` sorts them and adds them up again.

    weights                        activations          where the scale goes
    INT4 in fragment order         bf16, fp16           groups of 32, 64, 128: each group's sum; per row: the end
    FP8 e4m3 rows                  bf16, fp16           128-blocks: each block's sum; per row: the end
    FP8 e4m3 rows                  FP8, scale per token, or per token and 128 columns with blocks
    rows in 16 bits                of the same dtype; no scale

Bound: the bytes of the experts that got a token; with many tokens each, multiplications.
Shape suffixes: E experts, N out_features, K in_features, P pairs, G groups, M rows of a tile.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from quantkit_kernels import operands, strip_weight, w8a8_fp8
from quantkit_kernels.batch_invariant import FIXED_ROWS
from quantkit_kernels.capability import converts_float8
from quantkit_kernels.operands import FLOAT32, GROUPS, INT8, INT32, check_part
from quantkit_kernels.operators import for_device, operator
from quantkit_kernels.repack import BLOCK_COLUMNS, STRIP_ROWS
from quantkit_kernels.strip_weight import StripWeight
from quantkit_kernels.weight import LinearWeight

BLOCK = 128
ALIGNED = 16  # columns of rows
FLOATS = (torch.bfloat16, torch.float16)


class ExpertWeight(NamedTuple):
    """Weights of all experts.

    stored: INT4 fragments, int32 [E, N / 16, K / 64, 32, 4], or rows of float8_e4m3fn or 16-bit values [E, N, K], with
    columns padded to 16. scale: [E, N / 16, G, 16] in groups of INT4, float32 [E, N / 128, K / 128] in blocks of FP8,
    float32 [E, N] per row, None for 16 bits. zero_point: int8 like scale. group: 0: a scale per row, or none.
    """

    stored: Tensor
    scale: Tensor | None
    zero_point: Tensor | None
    shape: tuple[int, int]
    group: int


def prepare(weights: Iterable[LinearWeight], num_experts: int) -> ExpertWeight:
    """Lay out and stack quantized weights of one shape and format, taken one after another."""
    return _stack(map(_laid_out, weights), num_experts)


def prepare_dense(weights: Iterable[Tensor], num_experts: int) -> ExpertWeight:
    """Stack weights [N, K] in 16 bits, taken one after another."""
    padded = (
        ExpertWeight(pad(w_NK, (0, -w_NK.shape[1] % ALIGNED)), None, None, (w_NK.shape[0], w_NK.shape[1]), 0)
        for w_NK in weights
    )
    return _stack(padded, num_experts)


def _laid_out(weight: LinearWeight) -> ExpertWeight:
    """Of one expert: tensors without the first dimension."""
    if weight.stored_bits == 4:
        strips = strip_weight.prepare(weight)
        return ExpertWeight(strips.stored, strips.scale, strips.zero_point, strips.shape, strips.group_size)
    rows = w8a8_fp8.prepare(weight)
    n, k = rows.shape
    scale, group = (rows.scale, BLOCK) if rows.in_blocks else (rows.scale[:n], 0)
    return ExpertWeight(rows.codes_NK[:n], scale, None, (n, k), group)


def _stack(experts: Iterable[ExpertWeight], num_experts: int) -> ExpertWeight:
    """All experts in one tensor each, holding no more than one of them twice."""
    stored = torch.empty(0)
    scales: list[Tensor | None] = []
    zero_points: list[Tensor | None] = []
    for number, expert in enumerate(experts):
        if number == 0:
            stored = expert.stored.new_empty(num_experts, *expert.stored.shape)
        stored[number] = expert.stored
        scales.append(expert.scale)
        zero_points.append(expert.zero_point)
    return ExpertWeight(stored, _stacked(scales), _stacked(zero_points), expert.shape, expert.group)


def _stacked(parts: list[Tensor | None]) -> Tensor | None:
    tensors = [part for part in parts if part is not None]
    return torch.stack(tensors) if tensors else None


def rows_for(num_pairs: int, weight: ExpertWeight, *, batch_invariant: bool = False) -> int:
    """Rows of a tile: about what an expert gets, so that its weights are read once; of INT4 no more than 64.

    batch_invariant: as many in any batch, so that a pair's result does not depend on the others. In plain torch, on a
    CPU or for FP8 where the device does not convert it, the last bits may.
    """
    if batch_invariant:
        return FIXED_ROWS
    each = max(-(-num_pairs // len(weight.stored)), 1)
    return min(max(1 << (each - 1).bit_length(), 16), 64 if weight.stored.dtype == torch.int32 else 128)


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
    return for_device(moe_linear, x.device)(
        x, x_scale, stored, scale, zero_point, slots, expert_of_tile, num_pairs, n, group, out_dtype
    )


def plain(
    x_MK: Tensor,
    x_scale: Tensor | None,
    stored: Tensor,
    w_scale: Tensor | None,
    w_zero_point: Tensor | None,
    slots: Tensor,
    expert_of_tile: Tensor,
    num_pairs: int,
    num_outputs: int,
    group: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """`moe_linear` in plain torch: expert by expert, weights dequantized, in float32."""
    if num_pairs == 0:
        return x_MK.new_empty(0, num_outputs, dtype=out_dtype)
    check(
        x_MK, x_scale, stored, w_scale, w_zero_point, slots, expert_of_tile, num_pairs, num_outputs, group, out_dtype
    )  # fmt: skip
    num_cols = x_MK.shape[1]
    x = x_MK.float()
    if x_scale is not None:
        x = x * (x_scale.repeat_interleave(BLOCK, dim=1)[:, :num_cols] if group else x_scale)
    y_PN = torch.empty(num_pairs, num_outputs, dtype=out_dtype, device=x.device)
    pairs_of_tile = slots.view(len(expert_of_tile), -1)
    for expert in range(len(stored)):
        if (expert_of_tile == expert).any():
            pairs = pairs_of_tile[expert_of_tile == expert].flatten().long()
            pairs = pairs[pairs < num_pairs]
            scale = None if w_scale is None else w_scale[expert]
            zero_point = None if w_zero_point is None else w_zero_point[expert]
            w_NK = dequantized(stored[expert], scale, zero_point, num_outputs, num_cols, group)
            y_PN[pairs] = (x[pairs // (num_pairs // len(x))] @ w_NK.T).to(out_dtype)
    return y_PN


def _fake(
    x_MK: Tensor,
    x_scale: Tensor | None,
    stored: Tensor,
    w_scale: Tensor | None,
    w_zero_point: Tensor | None,
    slots: Tensor,
    expert_of_tile: Tensor,
    num_pairs: int,
    num_outputs: int,
    group: int,
    out_dtype: torch.dtype,
) -> Tensor:
    return x_MK.new_empty(num_pairs, num_outputs, dtype=out_dtype)


@operator("moe_linear", cpu=plain, fake=_fake)
def moe_linear(
    x_MK: Tensor,
    x_scale: Tensor | None,
    stored: Tensor,
    w_scale: Tensor | None,
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
    if num_pairs == 0:
        return x_MK.new_empty(0, num_outputs, dtype=out_dtype)
    check(
        x_MK, x_scale, stored, w_scale, w_zero_point, slots, expert_of_tile, num_pairs, num_outputs, group, out_dtype
    )  # fmt: skip
    if stored.dtype == torch.float8_e4m3fn and not converts_float8(x_MK.device):
        return plain(
            x_MK, x_scale, stored, w_scale, w_zero_point, slots, expert_of_tile, num_pairs, num_outputs, group,
            out_dtype,
        )  # fmt: skip
    from quantkit_kernels import moe_kernel

    y_PN = torch.empty(num_pairs, num_outputs, dtype=out_dtype, device=x_MK.device)
    moe_kernel.launch(x_MK, x_scale, stored, w_scale, w_zero_point, slots, expert_of_tile, group, y_PN)
    return y_PN


def dequantized(
    stored: Tensor, scale: Tensor | None, zero_point: Tensor | None, num_rows: int, num_cols: int, group: int
) -> Tensor:
    """One expert's weight, float32 [N, K]."""
    if scale is None:
        return stored[:, :num_cols].float()
    if stored.dtype == torch.int32 or not group:
        bits = 4 if stored.dtype == torch.int32 else 8
        weight = StripWeight(stored, scale, zero_point, None, (num_rows, num_cols), bits, group)
        return strip_weight.dense(weight, torch.float32)
    of_row = scale.repeat_interleave(group, dim=0)[:num_rows]
    return stored[:, :num_cols].float() * of_row.repeat_interleave(group, dim=1)[:, :num_cols]


def check(
    x_MK: Tensor,
    x_scale: Tensor | None,
    stored: Tensor,
    w_scale: Tensor | None,
    w_zero_point: Tensor | None,
    slots: Tensor,
    expert_of_tile: Tensor,
    num_pairs: int,
    num_outputs: int,
    group: int,
    out_dtype: torch.dtype,
) -> None:
    """What `moe_linear` says about its operands."""
    (num_rows, num_cols), num_experts, device = x_MK.shape, stored.shape[0], x_MK.device
    is_int4, is_codes = stored.dtype == torch.int32, x_MK.dtype == torch.float8_e4m3fn
    is_fp8, is_dense = stored.dtype == torch.float8_e4m3fn, stored.dtype in FLOATS
    assert is_int4 or is_fp8 or is_dense, f"weights of {stored.dtype}"
    assert x_MK.dtype in FLOATS or (is_codes and is_fp8), f"x of {x_MK.dtype}"
    assert not is_dense or x_MK.dtype == stored.dtype, f"x of {x_MK.dtype}, weights of {stored.dtype}"
    assert (x_scale is not None) == is_codes, "FP8 activations come with scales, others without"
    assert x_MK.stride()[1] == 1, "columns of x have to be next to each other"
    assert num_rows > 0 and num_pairs % num_rows == 0, f"{num_pairs} pairs for {num_rows} rows"
    assert out_dtype in operands.FLOATS, f"no output in {out_dtype}"
    num_tiles, num_slots = expert_of_tile.shape[0], slots.shape[0]
    rows = num_slots // num_tiles
    assert rows * num_tiles == num_slots and rows & (rows - 1) == 0, f"{num_slots} slots in {num_tiles} tiles"
    check_part("slots", slots, INT32, (num_slots,), device)
    check_part("experts of tiles", expert_of_tile, INT32, (num_tiles,), device)
    if is_int4:
        fragments = (-(-num_outputs // STRIP_ROWS), -(-num_cols // BLOCK_COLUMNS), 32, 4)
        check_part("fragments", stored, INT32, (num_experts, *fragments), device)
    else:
        shape = (num_experts, num_outputs, -(-num_cols // ALIGNED) * ALIGNED)
        check_part("weights", stored, (stored.dtype,), shape, device)
    if is_dense:
        assert w_scale is w_zero_point is None and group == 0, "weights in 16 bits have no scales"
        return
    if is_int4 and group:
        assert group in GROUPS, f"groups of {group} columns, not of {GROUPS}"
        strips = (num_experts, -(-num_outputs // STRIP_ROWS), -(-num_cols // group), 16)
        check_part("scales", w_scale, operands.FLOATS, strips, device)
        if w_zero_point is not None:
            check_part("zero points", w_zero_point, INT8, strips, device)
        return
    assert w_zero_point is None, "zero points are in groups of INT4"
    assert group == 0 or (is_fp8 and group == BLOCK), f"groups of {group} columns"
    blocks = -(-num_cols // BLOCK)
    per_block = (num_experts, -(-num_outputs // BLOCK), blocks)
    check_part("scales", w_scale, FLOAT32, per_block if group else (num_experts, num_outputs), device)
    if is_codes:
        check_part("scales of x", x_scale, FLOAT32, (num_rows, blocks if group else 1), device)
