"""Scales and codes improved in turn, each for the least error at the output given the others.

GPTQ is greedy: a column cannot know what later ones will lose, and scales are chosen before any code is. Here every
scale is moved to the minimum of the loss, a parabola, then every code to the nearest of its own, sweep after sweep;
the loss never grows. With E = W − Ŵ both need E (H + damping), kept up to date by one matrix product per group or
block, so a sweep costs about as much as two runs of GPTQ.

Source: coordinate descent as in arXiv:2309.01885 (QuantEase), with scales as further coordinates.
Shape suffixes: N out_features, K in_features, C columns of a group or block.
"""

import torch
from torch import Tensor

from quantkit.algorithms.factor import Factor
from quantkit.algorithms.gptq import BLOCK_COLUMNS, column_scales, solve_block, solve_block_on_gpu
from quantkit.algorithms.rounded import Rounded
from quantkit.schemes import PerChannel, PerGroup, QParams, Spec
from quantkit.schemes.tiles import expand_to_weight, round_scale

SWEEPS = 2


def refine(
    w_NK: Tensor,
    codes_NK: Tensor,
    qparams: QParams,
    hessian_KK: Tensor,
    factor: Factor,
    spec: Spec,
    *,
    sweeps: int = SWEEPS,
) -> Rounded:
    """Codes and scales of less loss, from those that some rounding chose; zero points stay.

    w_NK: any float dtype. hessian_KK: mean of x xᵀ, float32 [K, K], of which `factor` is the factor. Scales move where
    a row has its own (per group and per channel); the others stay, and so does every scale's sign. Rows are
    independent. Peak memory: seven times the weight in float32.
    """
    damping = factor.damping * hessian_KK.diagonal().mean().item()
    state = _State(w_NK, Rounded(codes_NK, qparams), hessian_KK, damping, spec)
    for _ in range(sweeps):
        if isinstance(spec.granularity, PerChannel | PerGroup):
            state.sweep_scales()
        state.sweep_codes()
    return state.result()


class _State:
    """Codes and scales, and what follows from them: E and E (H + damping), transposed, float32 [K, N]."""

    def __init__(self, w_NK: Tensor, start: Rounded, hessian_KK: Tensor, damping: float, spec: Spec) -> None:
        self.spec, self.hessian_KK, self.damping = spec, hessian_KK, damping
        self.codes_KN = start.codes_NK.T.clone(memory_format=torch.contiguous_format)
        self.qparams = start.qparams
        self.scale_KN = self._expanded(start.qparams.scale)
        zero_point = start.qparams.zero_point
        self.zero_point_KN = None if zero_point is None else self._expanded(zero_point)
        self.error_KN = w_NK.float().T - self._steps(slice(None)) * self.scale_KN
        self.gradient_KN = self.hessian_KK @ self.error_KN + self.damping * self.error_KN

    def sweep_scales(self) -> None:
        """Each scale in turn to its best value that the dtype on disk has."""
        num_cols = len(self.codes_KN)
        size = self.spec.granularity.size if isinstance(self.spec.granularity, PerGroup) else num_cols
        scale_NG = self.qparams.scale.clone()
        for group, start in enumerate(range(0, num_cols, size)):
            columns = slice(start, start + size)
            steps_CN = self._steps(columns)
            curvature_N = (steps_CN * (self._damped(columns) @ steps_CN)).sum(dim=0)
            slope_N = (steps_CN * self.gradient_KN[columns]).sum(dim=0)
            before_N = scale_NG[:, group].float()
            best_N = before_N + torch.where(curvature_N > 0, slope_N / curvature_N, 0)
            after_N = round_scale(torch.where(best_N * before_N > 0, best_N, before_N), scale_NG.dtype)
            self._add_error(columns, steps_CN * (before_N - after_N.float()))
            scale_NG[:, group] = after_N
        self.qparams, self.scale_KN = self.qparams._replace(scale=scale_NG), self._expanded(scale_NG)

    def sweep_codes(self) -> None:
        """Each code in turn to its best value."""
        solve = solve_block_on_gpu if self.codes_KN.is_cuda else solve_block
        num_cols, num_rows = self.codes_KN.shape
        scales = column_scales(self.qparams, self.spec.granularity, num_rows, num_cols)
        for start in range(0, num_cols, BLOCK_COLUMNS):
            columns = slice(start, min(start + BLOCK_COLUMNS, num_cols))
            # a block of gptq with the present values as weights: what changes takes the part of what is lost
            now_CN = self._steps(columns) * self.scale_KN[columns]
            block_scales = scales._replace(group_K=scales.group_K[columns])
            gradient_CN = self.gradient_KN[columns].clone()
            solved = solve(now_CN, gradient_CN, self._damped(columns), self.spec, block_scales)
            self.codes_KN[columns] = solved.codes_CN
            self._add_error(columns, solved.lost_CN)

    def result(self) -> Rounded:
        """What has become of the start."""
        return Rounded(self.codes_KN.T.clone(memory_format=torch.contiguous_format), self.qparams)

    def _add_error(self, columns: slice, added_CN: Tensor) -> None:
        self.error_KN[columns] += added_CN
        self.gradient_KN[columns].add_(added_CN, alpha=self.damping)
        self.gradient_KN.addmm_(self.hessian_KK[:, columns], added_CN)

    def _damped(self, columns: slice) -> Tensor:
        block_CC = self.hessian_KK[columns, columns].clone()
        block_CC.diagonal().add_(self.damping)
        return block_CC

    def _steps(self, columns: slice) -> Tensor:
        """code − zero_point: what the scale multiplies."""
        steps_CN = self.codes_KN[columns].float()
        return steps_CN if self.zero_point_KN is None else steps_CN - self.zero_point_KN[columns]

    def _expanded(self, qparam: Tensor) -> Tensor:
        num_cols, num_rows = self.codes_KN.shape
        by_row = expand_to_weight(qparam.float(), self.spec.granularity, num_rows, num_cols)
        return by_row.T.clone(memory_format=torch.contiguous_format)
