"""GPTQ: columns are rounded one after another, and each makes up for what those before it lost.

Columns go in descending order of their input's second moment, but groups and scales stay where they are in the
weight ("static act-order"), so nothing in the file format changes. Scales are chosen before, from the weights, for
the errors that no later column can make up for (`Factor.importance_K`).

With H + damping = R Rᵀ (R upper triangular, columns in the order of rounding) the loss of a row is |(w − ŵ) R|².
Its element c is (w − ŵ)[c] · R[c, c] + Σ_{j<c} (w − ŵ)[j] · R[j, c], and rounding to nearest what makes that zero,

    target[c] = w[c] + carried[c] / R[c, c]        carried[c] = Σ_{j<c} lost[j] · R[j, c]        lost = w − ŵ

gives the same codes as updating the weights with the inverse of H, which is never needed. `carried` of the columns
behind a block is brought up to date by one matrix product.

Source: arXiv:2210.17323 section 3; arXiv:2507.18553 for the equivalence.
Shape suffixes: N out_features, K in_features, C columns of a block.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from quantkit.algorithms.factor import DAMPING, Factor, factorize
from quantkit.algorithms.rounded import Rounded, output_loss
from quantkit.algorithms.scale_search import search_qparams
from quantkit.numerics import affine
from quantkit.schemes import FloatSpec, QParams, Spec
from quantkit.schemes.tiles import dequantize_weight, expand_to_weight, minmax_qparams, quantize_weight

BLOCK_COLUMNS = 128
Scales = Literal["minmax", "mse", "importance"]


def gptq(
    w_NK: Tensor,
    hessian: Tensor | Factor,
    spec: Spec,
    scale_dtype: torch.dtype,
    *,
    scales: Scales | QParams = "importance",
    damping: float = DAMPING,
) -> Rounded:
    """Codes of least error at the output, found greedily, on scales chosen before.

    w_NK: any float dtype. hessian: mean of x xᵀ, float32 [K, K], or its factor, which linears that read the same input
    share (`damping` is then the factor's). scales: how they are chosen, or the scales themselves.
    Raises CalibrationError if the Hessian is not finite; one that cannot be factorized is a `fallback` to rtn.
    Peak memory: four times the weight in float32.
    """
    factor = factorize(hessian, damping) if isinstance(hessian, Tensor) else hessian
    if factor is None:
        assert isinstance(hessian, Tensor), "a factor given is a factor"
        return _nearest(w_NK, hessian, spec, _qparams(w_NK, hessian.diagonal(), spec, scale_dtype, scales))
    qparams = _qparams(w_NK, factor.importance_K, spec, scale_dtype, scales)
    codes_NK, loss_N = gptq_codes(w_NK, factor, spec, qparams)
    return Rounded(codes_NK, qparams, loss_N.double().mean().item())


def gptq_codes(w_NK: Tensor, factor: Factor, spec: Spec, qparams: QParams) -> tuple[Tensor, Tensor]:
    """Codes [N, K] on given scales, and the loss of each row, (w − ŵ) H (w − ŵ)ᵀ, float32 [N].

    Rows are independent: linears that share the factor can be rounded as one, their rows (and scales) concatenated.
    """
    columns = _columns_in_order(w_NK, factor.order_K, spec, qparams)
    codes_KN = torch.empty_like(columns.w_CN, dtype=_code_dtype(spec))
    carried_KN = torch.zeros_like(columns.w_CN)
    loss_N = torch.zeros_like(columns.w_CN[0])
    for start in range(0, len(codes_KN), BLOCK_COLUMNS):
        block = slice(start, min(start + BLOCK_COLUMNS, len(codes_KN)))
        solved = solve_block(columns.part(block), carried_KN[block], factor.upper_KK[block, block], spec)
        codes_KN[block] = solved.codes_CN
        loss_N += solved.loss_N - factor.damping * solved.lost_CN.square().sum(dim=0)
        carried_KN[block.stop :].addmm_(factor.upper_KK[block, block.stop :].T, solved.lost_CN)
    codes_NK = torch.empty(w_NK.shape, dtype=codes_KN.dtype, device=w_NK.device)
    codes_NK.T[factor.order_K] = codes_KN
    return codes_NK, loss_N.clamp_(min=0)


class Columns(NamedTuple):
    """Columns of a weight as contiguous rows, each with its scale and zero point, all float32 [C, N]."""

    w_CN: Tensor
    scale_CN: Tensor
    zero_point_CN: Tensor | None

    def part(self, columns: slice) -> "Columns":
        """Some of the columns."""
        zero_point_CN = None if self.zero_point_CN is None else self.zero_point_CN[columns]
        return Columns(self.w_CN[columns], self.scale_CN[columns], zero_point_CN)


class SolvedBlock(NamedTuple):
    """codes_CN. lost_CN: w − ŵ, float32. loss_N: the block's part of (w − ŵ) R Rᵀ (w − ŵ)ᵀ, float32."""

    codes_CN: Tensor
    lost_CN: Tensor
    loss_N: Tensor


def solve_block(columns: Columns, carried_CN: Tensor, upper_CC: Tensor, spec: Spec) -> SolvedBlock:
    """Round the columns of one block in turn, all rows at once.

    carried_CN: Σ lost · R over the columns of the blocks before, float32. upper_CC: this block's part of R.
    """
    w_CN, scale_CN, zero_point_CN = columns
    target_CN, lost_CN, codes_CN = torch.empty_like(w_CN), torch.empty_like(w_CN), []
    diagonal_C = upper_CC.diagonal()
    inverse = diagonal_C.reciprocal().tolist()
    for column, target_N in enumerate(target_CN):
        scale_N = scale_CN[column]
        zero_point_N = None if zero_point_CN is None else zero_point_CN[column]
        carried_N = torch.addmv(carried_CN[column], lost_CN[:column].T, upper_CC[:column, column])
        torch.add(w_CN[column], carried_N, alpha=inverse[column], out=target_N)
        codes_CN.append(_nearest_codes(target_N, spec, scale_N, zero_point_N))
        value_N = affine.dequantize(codes_CN[-1], scale_N, zero_point_N)
        torch.sub(w_CN[column], value_N, out=lost_CN[column])
    residual_CN = (target_CN - w_CN + lost_CN) * diagonal_C.unsqueeze(1)
    return SolvedBlock(torch.stack(codes_CN), lost_CN, residual_CN.square_().sum(dim=0))


def _nearest_codes(w_N: Tensor, spec: Spec, scale_N: Tensor, zero_point_N: Tensor | None) -> Tensor:
    if isinstance(spec, FloatSpec):
        return affine.quantize_e4m3(w_N, scale_N)
    return affine.quantize_int(w_N, scale_N, zero_point_N, spec.qmin, spec.qmax)


def _code_dtype(spec: Spec) -> torch.dtype:
    return torch.float8_e4m3fn if isinstance(spec, FloatSpec) else torch.int8


def _columns_in_order(w_NK: Tensor, order_K: Tensor, spec: Spec, qparams: QParams) -> Columns:
    def in_order(of_weight_NK: Tensor) -> Tensor:
        return of_weight_NK.float().T[order_K].contiguous()

    num_rows, num_cols = w_NK.shape
    expanded = [
        None if part is None else in_order(expand_to_weight(part, spec.granularity, num_rows, num_cols))
        for part in qparams
    ]
    assert expanded[0] is not None, "there is a scale"
    return Columns(in_order(w_NK), expanded[0], expanded[1])


def _qparams(
    w_NK: Tensor, importance_K: Tensor, spec: Spec, scale_dtype: torch.dtype, scales: Scales | QParams
) -> QParams:
    if isinstance(scales, QParams):
        return scales
    if scales == "minmax":
        return minmax_qparams(w_NK, spec, scale_dtype)
    return search_qparams(w_NK, spec, scale_dtype, importance_K if scales == "importance" else None)


def _nearest(w_NK: Tensor, hessian_KK: Tensor, spec: Spec, qparams: QParams) -> Rounded:
    codes_NK = quantize_weight(w_NK, spec, qparams)
    error_NK = w_NK.float() - dequantize_weight(codes_NK, spec.granularity, qparams)
    reason = (
        "rtn instead of gptq: the second moments of its input are not positive definite, whatever the damping"
    )
    return Rounded(codes_NK, qparams, output_loss(error_NK, hessian_KK), reason)
