"""`gptq_block` on a GPU, one launch: each program rounds the columns of its rows in turn.

Everything is laid out [columns, rows]:

              rows →
    columns   w w w w | w w w w | …     a program has ROWS rows; `lost` stays in its registers, L comes from the
       ↑      w w w w | w w w w | …     cache, a column of w, carried and scale is one coalesced read

Bound: 2 · C multiply-adds per weight against 15 bytes, so neither: the C steps in turn, each as long as its chain of a
division, a rounding and a sum over at most 128 columns, are what it takes.
Shape suffixes: B batches, C columns (at most 128), N out_features, G groups.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit_kernels.operators import on_its_device
from quantkit_kernels.rounding import E4M3_MAX, e4m3_bits, round_e4m3, round_even

MAX_COLUMNS = 128
ROWS, NUM_WARPS = 32, 4


@triton.jit
def _load_column(
    w, carried, factor, scale, zero_point, group, c, stride_w, stride_carried, stride_scale, rows, is_row,
    HAS_ZERO_POINT: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """All that column c needs: weights, carried, scale and zero point of the rows, column c of L and its diagonal."""
    at_group = tl.load(group + c) * stride_scale + rows
    w_N = tl.load(w + c * stride_w + rows, mask=is_row, other=0.0).to(tl.float32)
    carried_N = tl.load(carried + c * stride_carried + rows, mask=is_row, other=0.0)
    scale_N = tl.load(scale + at_group, mask=is_row, other=1.0).to(tl.float32)
    zero_point_N = tl.zeros_like(scale_N)
    if HAS_ZERO_POINT:
        zero_point_N = tl.load(zero_point + at_group, mask=is_row, other=0).to(tl.float32)
    factor_C = tl.load(factor + c * COLUMNS + tl.arange(0, COLUMNS))
    diagonal = tl.load(factor + c * COLUMNS + c)
    return w_N, carried_N, scale_N, zero_point_N, factor_C, diagonal


@triton.jit
def gptq_block_kernel(
    w, carried, factor, scale, zero_point, group, codes, lost, loss,
    num_rows, qmin, qmax, batch_w, stride_w, batch_carried, stride_carried, batch_scale, stride_scale,
    NUM_COLUMNS: tl.constexpr, IS_FLOAT8: tl.constexpr, HAS_ZERO_POINT: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """factor: [B, C, COLUMNS], row c is column c of L from the diagonal down. codes, lost: [B, C, N]. loss: [B, N]."""
    batch = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = rows < num_rows
    w += batch * batch_w
    carried += batch * batch_carried
    scale += batch * batch_scale
    if HAS_ZERO_POINT:
        zero_point += batch * batch_scale
    factor += batch * NUM_COLUMNS * COLUMNS
    codes += batch * NUM_COLUMNS * num_rows
    lost += batch * NUM_COLUMNS * num_rows

    column = tl.arange(0, COLUMNS)[:, None]
    lost_CN = tl.zeros((COLUMNS, ROWS), dtype=tl.float32)
    loss_N = tl.zeros((ROWS,), dtype=tl.float32)
    w_N, carried_N, scale_N, zero_point_N, factor_C, diagonal = _load_column(
        w, carried, factor, scale, zero_point, group, NUM_COLUMNS - 1, stride_w, stride_carried, stride_scale,
        rows, is_row, HAS_ZERO_POINT, COLUMNS,
    )  # fmt: skip
    for step in range(NUM_COLUMNS):
        c = NUM_COLUMNS - 1 - step
        following = tl.maximum(c - 1, 0)  # read ahead: its latency passes meanwhile
        next_w_N, next_carried_N, next_scale_N, next_zero_point_N, next_factor_C, next_diagonal = _load_column(
            w, carried, factor, scale, zero_point, group, following, stride_w, stride_carried, stride_scale,
            rows, is_row, HAS_ZERO_POINT, COLUMNS,
        )  # fmt: skip
        # four sums side by side: one after another they would wait for each other
        products = tl.reshape(lost_CN * factor_C[:, None], (COLUMNS // 4, 4, ROWS))
        inside_N = tl.sum(tl.sum(products, axis=0), axis=0)
        target_N = w_N + tl.div_rn(carried_N + inside_N, diagonal)
        code_N = tl.div_rn(target_N, scale_N) + zero_point_N
        code_N = tl.minimum(tl.maximum(code_N, qmin), qmax)
        if IS_FLOAT8:
            code_N = round_e4m3(code_N)
            stored_N = e4m3_bits(code_N)
        else:
            code_N = round_even(code_N)
            stored_N = code_N.to(tl.int8)
        rounded_N = (code_N - zero_point_N) * scale_N
        lost_N = w_N - rounded_N
        weighted_N = (target_N - rounded_N) * diagonal
        loss_N += weighted_N * weighted_N
        lost_CN = tl.where(column == c, lost_N[None, :], lost_CN)
        tl.store(codes + c * num_rows + rows, stored_N, mask=is_row)
        tl.store(lost + c * num_rows + rows, lost_N, mask=is_row)
        w_N, carried_N, scale_N, zero_point_N = next_w_N, next_carried_N, next_scale_N, next_zero_point_N
        factor_C, diagonal = next_factor_C, next_diagonal
    tl.store(loss + batch * num_rows + rows, loss_N, mask=is_row)


@on_its_device
def launch(
    w_BCN: Tensor,
    carried_BCN: Tensor,
    lower_BCC: Tensor,
    scale_BGN: Tensor,
    zero_point_BGN: Tensor | None,
    group_C: Tensor,
    qmin: int,
    qmax: int,
    is_float8: bool,
    *,
    rows: int = ROWS,
    num_warps: int = NUM_WARPS,
) -> tuple[Tensor, Tensor, Tensor]:
    """`gptq_block` with programs of another shape, which changes nothing but the order of summation."""
    batch, num_columns, num_rows = w_BCN.shape
    assert num_columns <= MAX_COLUMNS, f"a block of {num_columns} columns"
    for tensor in (w_BCN, carried_BCN, scale_BGN, *(() if zero_point_BGN is None else (zero_point_BGN,))):
        assert tensor.stride(2) == 1, "rows have to be next to each other"
    assert zero_point_BGN is None or zero_point_BGN.stride() == scale_BGN.stride(), "laid out like the scale"
    factor = lower_BCC.new_zeros(batch, num_columns, MAX_COLUMNS)
    factor[:, :, :num_columns] = lower_BCC.mT.triu()
    codes_BCN = torch.empty(w_BCN.shape, dtype=torch.int8, device=w_BCN.device)
    lost_BCN = torch.empty(w_BCN.shape, dtype=torch.float32, device=w_BCN.device)
    loss_BN = torch.empty(batch, num_rows, dtype=torch.float32, device=w_BCN.device)
    gptq_block_kernel[(triton.cdiv(num_rows, rows), batch)](
        w_BCN, carried_BCN, factor, scale_BGN, scale_BGN if zero_point_BGN is None else zero_point_BGN, group_C,
        codes_BCN, lost_BCN, loss_BN, num_rows,
        -E4M3_MAX.value if is_float8 else float(qmin), E4M3_MAX.value if is_float8 else float(qmax),
        *w_BCN.stride()[:2], *carried_BCN.stride()[:2], *scale_BGN.stride()[:2],
        num_columns, is_float8, zero_point_BGN is not None, MAX_COLUMNS, rows, num_warps=num_warps,
    )  # fmt: skip
    return codes_BCN, lost_BCN, loss_BN
