"""Residual add, RMS norm, and the codes that the next linear reads, as one operator.

    x [T, E] ─┐                    ┌─► residual [T, E]     the sum, rounded, where the residual was
   (norm) ─►  + ─► h ─► h / rms(h) ┤
    residual ─┘                    └─► · weight ─► normed [T, E]   or   codes [T, E], scale [T, G]

The sum goes where the residual was: nobody reads the old one again, and a second buffer would only take more of the L2.

Roundings are those of the models: the sum to the dtype of x; then weight · round(ĥ), or, with `plus_one` (Gemma),
round(ĥ · (1 + weight)). Gemma has a second norm, of x before it is added: `inner_E`. Codes are those of `row_codes` of
what `rms_norm` returns, bit by bit.

Shape suffixes: T tokens, E features, G groups of features that share a scale.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantkit_kernels.operators import operator
from quantkit_kernels.row_codes import Codes, check_rows, encode_rows


class Norm(NamedTuple):
    """weight_E: in the dtype of the activations. plus_one: it is stored around 0. inner_E: weight of x's own norm."""

    weight_E: Tensor
    eps: float
    plus_one: bool = False
    inner_E: Tensor | None = None


def norm_rows(x_TE: Tensor, residual_TE: Tensor | None, norm: Norm) -> Tensor:
    """`rms_norm` in plain torch."""
    check(x_TE, residual_TE, norm)
    if norm.inner_E is not None:
        x_TE = _normed(x_TE, norm.inner_E, norm)
    if residual_TE is not None:
        x_TE = residual_TE.add_(x_TE)
    return _normed(x_TE, norm.weight_E, norm)


def _normed(x_TE: Tensor, weight_E: Tensor, norm: Norm) -> Tensor:
    wide_TE = x_TE.float()
    normed_TE = wide_TE * torch.rsqrt(wide_TE.square().mean(dim=-1, keepdim=True) + norm.eps)
    if norm.plus_one:
        return (normed_TE * (1.0 + weight_E.float())).to(x_TE.dtype)
    return weight_E * normed_TE.to(x_TE.dtype)


def check(x_TE: Tensor, residual_TE: Tensor | None, norm: Norm) -> None:
    """What `rms_norm` says about its operands."""
    check_rows(x_TE)
    for weight_E in (norm.weight_E, norm.inner_E):
        if weight_E is not None:
            assert weight_E.shape == x_TE.shape[1:] and weight_E.is_contiguous(), f"weight {weight_E.shape}"
            assert weight_E.dtype == x_TE.dtype, f"weight of {weight_E.dtype} for {x_TE.dtype}"
    if residual_TE is not None:
        check_rows(residual_TE)
        assert residual_TE.shape == x_TE.shape, f"residual {residual_TE.shape} for {x_TE.shape}"
        assert residual_TE.dtype == x_TE.dtype, f"residual of {residual_TE.dtype} for {x_TE.dtype}"


def _norm(x_TE: Tensor, residual_TE: Tensor | None, *norm: Any) -> Tensor:
    return norm_rows(x_TE, residual_TE, Norm(*norm))


def _fake_norm(x_TE: Tensor, *_: object) -> Tensor:
    return x_TE.new_empty(x_TE.shape)


@operator("rms_norm", cpu=_norm, fake=_fake_norm, mutates=("residual_TE",))
def rms_norm(
    x_TE: Tensor,
    residual_TE: Tensor | None,
    weight_E: Tensor,
    eps: float,
    plus_one: bool,
    inner_E: Tensor | None,
) -> Tensor:
    """Norm of x, or of x + residual, [T, E] in the dtype of x; the residual becomes the sum.

    All of one float dtype, features contiguous. The rest is a `Norm`.
    """
    from quantkit_kernels import norm_kernel

    return norm_kernel.launch(x_TE, residual_TE, Norm(weight_E, eps, plus_one, inner_E))


def _norm_codes(x_TE: Tensor, residual_TE: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    normed_TE = norm_rows(x_TE, residual_TE, Norm(*arguments[:4]))
    return encode_rows(normed_TE, Codes(*arguments[4:]))


def _fake_codes(x_TE: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    code_dtype, group = arguments[5:7]
    return Codes(code_dtype, group).empty(x_TE, x_TE.shape[1])


@operator("rms_norm_codes", cpu=_norm_codes, fake=_fake_codes, mutates=("residual_TE",))
def rms_norm_codes(
    x_TE: Tensor,
    residual_TE: Tensor | None,
    weight_E: Tensor,
    eps: float,
    plus_one: bool,
    inner_E: Tensor | None,
    code_dtype: torch.dtype,
    group: int,
    static_scale: Tensor | None,
    zero_point: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`rms_norm`, then `quantize_rows` of it: codes [T, E] and their scale, float32 [T, G]."""
    from quantkit_kernels import norm_kernel

    codes = Codes(code_dtype, group, static_scale, zero_point)
    return norm_kernel.launch_codes(x_TE, residual_TE, Norm(weight_E, eps, plus_one, inner_E), codes)
