"""GPTQ: columns are rounded one after another, and what each loses is made up for by those still to come.

Columns go in descending order of their input's second moment, but groups and scales stay where they are in the
weight ("static act order"), so nothing in the file format changes. Scales are chosen before, from the weights.
Source: arXiv:2210.17323.

Shape suffixes: N out_features, K in_features, C columns of a block.
"""

import torch
from torch import Tensor

from quantkit.algorithms.factor import Factor
from quantkit.numerics import affine
from quantkit.schemes import FloatSpec, QParams, Spec
from quantkit.schemes.tiles import expand_to_weight

BLOCK_COLUMNS = 128


def gptq(w_NK: Tensor, factor: Factor, spec: Spec, qparams: QParams) -> Tensor:
    """Codes [N, K], int8 or float8_e4m3fn, on the grid of spec and qparams.

    w_NK: any float dtype. Peak memory: five times the weight in float32.
    """
    shape = (w_NK.shape[0], w_NK.shape[1])
    order_K = factor.order_K
    # transposed, so that a column of the weight is a contiguous row
    w_KN = w_NK.float().T[order_K].contiguous()
    w_KN[factor.dead_K[order_K]] = 0  # nothing is lost there, and nothing has to be made up for
    scale_KN = expand_to_weight(qparams.scale.float(), spec.granularity, *shape).T[order_K].contiguous()
    zero_point_KN = None
    if qparams.zero_point is not None:
        zero_point_KN = (
            expand_to_weight(qparams.zero_point.float(), spec.granularity, *shape).T[order_K].contiguous()
        )
    code_dtype = torch.float8_e4m3fn if isinstance(spec, FloatSpec) else torch.int8
    codes_KN = torch.empty(w_KN.shape, dtype=code_dtype, device=w_NK.device)
    for start in range(0, len(w_KN), BLOCK_COLUMNS):
        block = slice(start, min(start + BLOCK_COLUMNS, len(w_KN)))
        zero_point_CN = None if zero_point_KN is None else zero_point_KN[block]
        codes_KN[block], error_CN = solve_block(
            w_KN[block], factor.upper_KK[block, block], spec, scale_KN[block], zero_point_CN
        )
        w_KN[block.stop :] -= factor.upper_KK[block, block.stop :].T @ error_CN
    codes_NK = torch.empty(shape, dtype=code_dtype, device=w_NK.device)
    codes_NK.T[order_K] = codes_KN
    return codes_NK


def solve_block(
    w_CN: Tensor, upper_CC: Tensor, spec: Spec, scale_CN: Tensor, zero_point_CN: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Round the columns of one block in turn; returns codes and scaled errors, both [C, N]. Changes w_CN."""
    codes, errors = [], []
    for column in range(len(w_CN)):
        zero_point = None if zero_point_CN is None else zero_point_CN[column]
        code = _round(w_CN[column], spec, scale_CN[column], zero_point)
        lost = w_CN[column] - affine.dequantize(code, scale_CN[column], zero_point)
        error = lost / upper_CC[column, column]
        w_CN[column + 1 :].addr_(upper_CC[column, column + 1 :], error, alpha=-1)
        codes.append(code)
        errors.append(error)
    return torch.stack(codes), torch.stack(errors)


def _round(w: Tensor, spec: Spec, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    if isinstance(spec, FloatSpec):
        return affine.quantize_e4m3(w, scale)
    return affine.quantize_int(w, scale, zero_point, spec.qmin, spec.qmax)
