"""A weight as a layer of a model holds it, and its product with any input: every family is called alike.

    LinearWeight ──► prepare: the family for input and device, in its layout ──► multiply(x, prepared, …) ──► y

What goes with x are its scales (and zero points) where it is codes. On a CPU the operators compute what they define, in
plain torch; the catalog has faster kernels for that.

Shape suffixes: M rows, N out_features, K in_features.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantkit_kernels import w4a8, w8a8_fp8, w8a8_int8, weight_only
from quantkit_kernels.catalog import TENSOR, WeightFormat, find_gpu, format_of
from quantkit_kernels.w8a8_fp8 import Fp8Weight
from quantkit_kernels.w8a8_int8 import Int8Weight
from quantkit_kernels.weight import LinearWeight


class Prepared(NamedTuple):
    """family: its name in the catalog. operand: the weight in that family's layout."""

    family: str
    operand: Any
    batch_invariant: bool


def prepare(
    weight: LinearWeight | Tensor,
    input_dtype: torch.dtype,
    capability: tuple[int, int],
    *,
    batch_invariant: bool = False,
) -> Prepared:
    """Lay a weight out, once: quantized, or [N, K] in 16 bits.

    input_dtype: of x, or of its codes. batch_invariant: a row's result will not depend on how many others there are.
    Raises UnsupportedError.
    """
    stored = format_of(weight) if isinstance(weight, LinearWeight) else in_16_bits(weight.dtype)
    entry, family = find_gpu(stored, input_dtype, capability)
    return Prepared(entry.name, family.prepare(weight), batch_invariant)


def in_16_bits(dtype: torch.dtype) -> WeightFormat:
    """Of a weight that is not quantized."""
    return WeightFormat(16, dtype, TENSOR, False)


def multiply(
    x_MK: Tensor,
    weight: Prepared,
    *,
    bias_N: Tensor | None = None,
    x_scale: Tensor | None = None,
    x_zero_point: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x · wᵀ (+ bias), [M, N], in the dtype of x, or of codes in out_dtype.

    x_scale: of codes, float32 [M, 1] or [1], in blocks [M, ceil(K / 128)]; x_zero_point: int8, with INT8 codes.
    """
    operand, is_invariant = weight.operand, weight.batch_invariant
    if x_scale is None:
        assert x_zero_point is None and out_dtype in (None, x_MK.dtype), "x is no codes"
        return weight_only.multiply(x_MK, operand, bias_N, batch_invariant=is_invariant)
    assert out_dtype is not None, "the product of codes has the dtype that is asked for"
    if isinstance(operand, Fp8Weight):
        assert x_zero_point is None, "e4m3 codes have no zero points"
        return w8a8_fp8.multiply(x_MK, x_scale, operand, bias_N, out_dtype, batch_invariant=is_invariant)
    if isinstance(operand, Int8Weight):
        return w8a8_int8.multiply(
            x_MK, x_scale, x_zero_point, operand, bias_N, out_dtype, batch_invariant=is_invariant
        )
    return w4a8.multiply(
        x_MK, x_scale, x_zero_point, operand, bias_N, out_dtype, batch_invariant=is_invariant
    )
