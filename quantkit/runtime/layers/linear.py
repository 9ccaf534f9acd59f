"""Linears in torch, on a CPU and in float32: a dense one, a quantized one in the layouts its kernels want.

They take x itself: a quantized input is quantized here, step by step in the dtype of x as the checkpoint's format says.
Shape suffixes: T tokens, N out_features, K in_features.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from quantkit.runtime.layers.linear_part import LinearPart
from quantkit.runtime.layers.rows import AnyLinear, Rows
from quantkit.schemes import IntSpec, PerTensor, PerToken, Spec
from quantkit.schemes.activation import fake_quantize_input, input_qparams, to_codes
from quantkit_kernels.catalog import Kernel, choose_float, choose_int8
from quantkit_kernels.dense import linear
from quantkit_kernels.row_codes import Codes
from quantkit_kernels.weight import LinearWeight

FIXED_ROWS = 16  # of a product that no batch changes


class Linear:
    """y = x · wᵀ + b with a 16- or 32-bit weight [N, K]."""

    input_codes: Codes | None = None

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None = None) -> None:
        self.weight = weight_NK
        self.bias = bias_N

    def __call__(self, x: Rows) -> Tensor:
        """[T, K] to [T, N]."""
        return linear(_plain(x), self.weight, self.bias)


class QuantLinear:
    """y = q(x) · wᵀ + b with a quantized weight, and an input that is quantized first if the scheme says so.

    Kernels are chosen here, once: `float_kernels` for few rows up to any number, or `int8_kernel` where the
    input's codes are multiplied as integers.
    """

    input_codes: Codes | None = None

    def __init__(self, part: LinearPart, *, dtype: torch.dtype) -> None:
        weight, scheme = part.weight, part.scheme
        assert isinstance(weight, LinearWeight) and scheme is not None, f"{part.name} is not quantized"
        self.out_features, self.in_features = weight.codes_NK.shape
        self.scheme = scheme
        self.input_qparams = part.input_qparams
        self.int8_kernel = choose_int8(weight, dtype) if _takes_int8(scheme.activation) else None
        self.float_kernels = () if self.int8_kernel else choose_float(weight, dtype)
        kernels: list[Kernel] = [self.int8_kernel] if self.int8_kernel else [*self.float_kernels]
        self.operands: list[Any] = [kernel.prepare(weight, dtype) for kernel in kernels]
        self.bias = part.bias_N

    def __call__(self, x: Rows) -> Tensor:
        """[T, K] to [T, N], in the dtype of x."""
        y_TN = self._product(_plain(x))
        return y_TN if self.bias is None else y_TN + self.bias

    def _product(self, x_TK: Tensor) -> Tensor:
        spec = self.scheme.activation
        if self.int8_kernel is not None:
            assert spec is not None, "the integer kernel was chosen for this spec"
            qparams = input_qparams(x_TK, spec, self.input_qparams)
            codes_TK = to_codes(x_TK, spec, qparams).to(torch.int8)
            return self.int8_kernel.run(codes_TK, *qparams, self.operands[0]).to(x_TK.dtype)
        if spec is not None:
            x_TK = fake_quantize_input(x_TK, spec, self.input_qparams)
        for kernel, operand in zip(self.float_kernels, self.operands, strict=True):
            if kernel.max_rows is None or x_TK.shape[0] <= kernel.max_rows:
                return kernel.run(x_TK, operand)
        raise AssertionError("the last kernel takes any number of rows")

    @property
    def num_bytes(self) -> int:
        """Bytes of everything this layer keeps."""
        tensors = [value for operand in self.operands for value in operand if isinstance(value, Tensor)]
        unique = {tensor.data_ptr(): tensor for tensor in tensors}  # two kernels may share the codes
        return sum(tensor.untyped_storage().nbytes() for tensor in unique.values())

    def __repr__(self) -> str:
        """Shape and kernels."""
        kernels = [self.int8_kernel] if self.int8_kernel else self.float_kernels
        return f"{self.in_features} -> {self.out_features}, {', '.join(k.name for k in kernels)}"


class InFixedRows:
    """A linear of this file that computes FIXED_ROWS rows at a time, so that no batch changes a row's bits."""

    input_codes: Codes | None = None

    def __init__(self, linear: AnyLinear) -> None:
        self.linear = linear

    def __call__(self, x: Rows) -> Tensor:
        """[T, K] to [T, N]."""
        x_TK = _plain(x)
        parts = [
            self.linear(pad(part_TK, (0, 0, 0, FIXED_ROWS - len(part_TK))))
            for part_TK in torch.split(x_TK, FIXED_ROWS)
        ]
        return torch.cat(parts)[: len(x_TK)]


class SideBySide:
    """Linears of one input that are no one product, since their formats differ: one after the other.

    They share the input's codes where all read the same dynamic ones; else each makes its own.
    """

    def __init__(self, linears: list[AnyLinear]) -> None:
        self.linears = linears
        wanted = [linear.input_codes for linear in linears]
        first = wanted[0]
        is_shared = (
            first is not None and first.static_scale is None and all(codes == first for codes in wanted)
        )
        self.input_codes = first if is_shared else None

    def __call__(self, x: Rows) -> Tensor:
        """[T, K] to [T, N], the outputs of all next to each other."""
        return torch.cat([linear(x) for linear in self.linears], dim=1)


def _plain(x: Rows) -> Tensor:
    assert isinstance(x, Tensor), "codes for a linear that reads none"
    return x


def _takes_int8(spec: Spec | None) -> bool:
    return isinstance(spec, IntSpec) and isinstance(spec.granularity, PerToken | PerTensor)
