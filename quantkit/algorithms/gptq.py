"""GPTQ: columns are rounded one after another, and what each loses is made up for by those still to come.

Columns go in descending order of their input's second moment, but groups and scales stay where they are in the
weight ("static act order"), so nothing in the file format changes. Scales are chosen before, from the weights.
Source: arXiv:2210.17323.

The usual form keeps the weights up to date by means of the inverse of H. The same codes come of its factor itself, as
in the nearest-plane algorithm of lattices: with H = L Lᵀ,

    (W − Ŵ) H (W − Ŵ)ᵀ = ‖(W − Ŵ) L‖²,      column c of (W − Ŵ) L = Σ_{j ≥ c} (w_j − ŵ_j) L[j, c]

From the last column to the first, everything with j > c is known, and ŵ_c is the grid point that makes the sum least:
the one nearest to w_c + Σ_{j > c} (w_j − ŵ_j) L[j, c] / L[c, c].

Shape suffixes: N out_features, K in_features, C columns of a block, G rows of scales.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.algorithms.factor import Factor
from quantkit.numerics import affine
from quantkit.schemes import FloatSpec, Granularity, PerBlock, PerGroup, QParams, Spec
from quantkit_kernels.gptq_block import gptq_block

BLOCK_COLUMNS = 128
# Rows of so many weights are rounded at a time: enough to fill a GPU, and half a GB with what they need.
GPU_WEIGHTS = 1 << 25


class ColumnScales(NamedTuple):
    """Scales laid out for columns: scale_GN and zero_point_GN (or None); column k uses row group_K[k]."""

    scale_GN: Tensor
    zero_point_GN: Tensor | None
    group_K: Tensor

    def of_rows(self, rows: slice) -> "ColumnScales":
        """Those of some rows of the weight."""
        zero_point_GN = None if self.zero_point_GN is None else self.zero_point_GN[:, rows]
        return ColumnScales(self.scale_GN[:, rows], zero_point_GN, self.group_K)


class Solved(NamedTuple):
    """A block of rounded columns. codes_CN: int8 or float8_e4m3fn. lost_CN: w − ŵ, float32."""

    codes_CN: Tensor
    lost_CN: Tensor


def gptq(w_NK: Tensor, factor: Factor, spec: Spec, qparams: QParams) -> Tensor:
    """Codes [N, K], int8 or float8_e4m3fn, on the grid of spec and qparams.

    w_NK: any float dtype. Peak memory: the weight twice, once in float32, and its codes twice; on a GPU that of
    GPU_WEIGHTS, whatever the weight.
    """
    num_rows, num_cols = w_NK.shape
    scales = column_scales(qparams, spec.granularity, num_rows, num_cols)
    codes_NK = torch.empty(num_rows, num_cols, dtype=_code_dtype(spec), device=w_NK.device)
    step = max(1, GPU_WEIGHTS // num_cols) if w_NK.is_cuda else num_rows
    for start in range(0, num_rows, step):
        rows = slice(start, start + step)
        codes_KN = _round_columns(w_NK[rows], factor, spec, scales.of_rows(rows))
        codes_NK[rows].view(torch.int8).T[factor.order_K] = codes_KN.view(torch.int8)
    return codes_NK


def _round_columns(w_NK: Tensor, factor: Factor, spec: Spec, scales: ColumnScales) -> Tensor:
    """Codes [K, N], in the factor's order."""
    num_rows, num_cols = w_NK.shape
    order_K = factor.order_K
    # transposed, so that a column of the weight is a contiguous row
    w_KN = w_NK.T[order_K].clone(memory_format=torch.contiguous_format)
    w_KN[factor.dead_K[order_K]] = 0  # nothing is lost there, and nothing has to be made up for
    group_K = scales.group_K[order_K]
    carried_KN = torch.zeros(num_cols, num_rows, device=w_NK.device)
    codes_KN = torch.empty(num_cols, num_rows, dtype=_code_dtype(spec), device=w_NK.device)
    solve = solve_block_on_gpu if w_NK.is_cuda else solve_block
    for stop in range(num_cols, 0, -BLOCK_COLUMNS):
        block = slice(max(0, stop - BLOCK_COLUMNS), stop)
        lower_CC = factor.lower_KK[block, block]
        block_scales = scales._replace(group_K=group_K[block])
        codes_KN[block], lost_CN = solve(w_KN[block], carried_KN[block], lower_CC, spec, block_scales)
        carried_KN[: block.start].addmm_(factor.lower_KK[block, : block.start].T, lost_CN)
    return codes_KN


def column_scales(qparams: QParams, granularity: Granularity, num_rows: int, num_cols: int) -> ColumnScales:
    """The scales of a weight [num_rows, num_cols] by columns, in their dtype on disk."""
    columns = torch.arange(num_cols, device=qparams.scale.device)
    match granularity:
        case PerGroup(size):
            group_K = columns // size
        case PerBlock(_, cols):
            group_K = columns // cols
        case _:
            group_K = torch.zeros_like(columns)

    def by_column(qparam: Tensor) -> Tensor:
        if isinstance(granularity, PerBlock):
            qparam = qparam.repeat_interleave(granularity.rows, dim=0)[:num_rows]
        by_row = qparam.reshape(len(qparam), -1).expand(num_rows, -1)
        # a copy, because .contiguous() keeps odd strides where there is a single row
        return by_row.T.clone(memory_format=torch.contiguous_format)

    zero_point = qparams.zero_point
    return ColumnScales(
        by_column(qparams.scale), None if zero_point is None else by_column(zero_point), group_K
    )


def solve_block(
    w_CN: Tensor, carried_CN: Tensor, lower_CC: Tensor, spec: Spec, scales: ColumnScales
) -> Solved:
    """Round the columns of one block, the last one first. Changes carried_CN, which is what later columns add."""
    codes_CN = torch.empty(w_CN.shape, dtype=_code_dtype(spec))
    lost_CN = torch.empty(w_CN.shape)
    for column in reversed(range(len(w_CN))):
        w_N = w_CN[column].float()
        target_N = torch.addcdiv(w_N, carried_CN[column], lower_CC[column, column])
        group = scales.group_K[column]
        scale_N = scales.scale_GN[group]
        zero_point_N = None if scales.zero_point_GN is None else scales.zero_point_GN[group]
        codes_CN[column] = _round(target_N, spec, scale_N, zero_point_N)
        lost_CN[column] = w_N - affine.dequantize(codes_CN[column], scale_N, zero_point_N)
        carried_CN[:column].addr_(lower_CC[column, :column], lost_CN[column])
    return Solved(codes_CN, lost_CN)


def solve_block_on_gpu(
    w_CN: Tensor, carried_CN: Tensor, lower_CC: Tensor, spec: Spec, scales: ColumnScales
) -> Solved:
    """`solve_block` as one launch; leaves carried_CN as it is."""
    zero_point_GN = scales.zero_point_GN
    qmin, qmax = (0, 0) if isinstance(spec, FloatSpec) else (spec.qmin, spec.qmax)
    codes_BCN, lost_BCN, _ = gptq_block(
        w_CN.unsqueeze(0),
        carried_CN.unsqueeze(0),
        lower_CC.unsqueeze(0),
        scales.scale_GN.unsqueeze(0),
        None if zero_point_GN is None else zero_point_GN.unsqueeze(0),
        scales.group_K,
        qmin,
        qmax,
        isinstance(spec, FloatSpec),
    )
    codes_CN = codes_BCN[0].view(torch.float8_e4m3fn) if isinstance(spec, FloatSpec) else codes_BCN[0]
    return Solved(codes_CN, lost_BCN[0])


def _round(target_N: Tensor, spec: Spec, scale_N: Tensor, zero_point_N: Tensor | None) -> Tensor:
    if isinstance(spec, FloatSpec):
        return affine.quantize_e4m3(target_N, scale_N)
    return affine.quantize_int(target_N, scale_N, zero_point_N, spec.qmin, spec.qmax)


def _code_dtype(spec: Spec) -> torch.dtype:
    return torch.float8_e4m3fn if isinstance(spec, FloatSpec) else torch.int8
