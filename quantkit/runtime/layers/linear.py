"""Linears: one dense, one that owns a quantized weight in the layout its kernels want.

Shape suffixes: T tokens, N out_features, K in_features.
"""

from typing import Any

import torch
from torch import Tensor, nn

from quantkit.formats.compressed_tensors import StoredLinear
from quantkit.schemes import IntSpec, PerBlock, PerChannel, PerGroup, PerTensor, PerToken, Scheme, Spec
from quantkit.schemes.activation import fake_quantize_input, input_qparams, to_codes
from quantkit_kernels.catalog import Kernel, choose_float, choose_int8
from quantkit_kernels.dense import linear
from quantkit_kernels.weight import LinearWeight


class Linear(nn.Module):
    """y = x · wᵀ + b with a 16- or 32-bit weight [N, K]."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", weight_NK)
        self.register_buffer("bias", bias_N)

    def forward(self, x_TK: Tensor) -> Tensor:
        """[T, K] to [T, N]."""
        return linear(x_TK, self.weight, self.bias)


class QuantLinear(nn.Module):
    """y = q(x) · wᵀ + b with a quantized weight, and an input that is quantized first if the scheme says so.

    Kernels are chosen here, once: `float_kernels` for few rows up to any number, or `int8_kernel` where the
    input's codes are multiplied as integers.
    """

    bias: Tensor | None

    def __init__(
        self, stored: StoredLinear, scheme: Scheme, bias_N: Tensor | None, *, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = stored.codes_NK.shape
        self.dtype = dtype
        self.scheme = scheme
        self.input_qparams = stored.input_qparams
        weight = as_linear_weight(stored, scheme.weight)
        self.int8_kernel = choose_int8(weight, dtype) if _takes_int8(scheme.activation) else None
        self.float_kernels = () if self.int8_kernel else choose_float(weight, dtype)
        kernels: list[Kernel] = [self.int8_kernel] if self.int8_kernel else [*self.float_kernels]
        self.operands: list[Any] = [kernel.prepare(weight, dtype) for kernel in kernels]
        self.register_buffer("bias", bias_N)

    def forward(self, x_TK: Tensor) -> Tensor:
        """[T, K] to [T, N], in the dtype of x."""
        y_TN = self._product(x_TK)
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

    def extra_repr(self) -> str:
        """Shape and kernels, for print(model)."""
        kernels = [self.int8_kernel] if self.int8_kernel else self.float_kernels
        return f"{self.in_features} -> {self.out_features}, {', '.join(k.name for k in kernels)}"


def as_linear_weight(stored: StoredLinear, spec: Spec) -> LinearWeight:
    """A stored weight in the kernels' terms: scales as a 2-D grid of tiles."""
    num_rows, num_cols = stored.codes_NK.shape
    match spec.granularity:
        case PerTensor():
            tile = (num_rows, num_cols)
        case PerChannel():
            tile = (1, num_cols)
        case PerGroup(size):
            tile = (1, size)
        case PerBlock(rows, cols):
            tile = (rows, cols)
        case PerToken():
            raise AssertionError("no weight has tokens")
    scale, zero_point = stored.qparams
    grid = (-(-num_rows // tile[0]), -(-num_cols // tile[1]))
    zero_grid = None if zero_point is None else zero_point.reshape(grid)
    return LinearWeight(stored.codes_NK, scale.reshape(grid), zero_grid, tile, spec.bits)


def _takes_int8(spec: Spec | None) -> bool:
    return isinstance(spec, IntSpec) and isinstance(spec.granularity, PerToken | PerTensor)
