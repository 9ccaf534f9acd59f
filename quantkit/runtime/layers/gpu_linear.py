"""Linears on a GPU: each through the catalog of kernels, with its input in 16 bits or as the codes they multiply.

Devices without FP8 instructions take FP8 inputs in 16 bits: the weight alone stays quantized.
Shape suffixes: T tokens, N out_features, K in_features.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from quantkit.errors import SchemeError
from quantkit.runtime.layers.linear_part import LinearPart
from quantkit.runtime.layers.rows import CodedRows, Rows, encode
from quantkit.runtime.target import Target
from quantkit.schemes import FloatSpec, PerBlock, PerChannel, PerGroup, Scheme, Spec
from quantkit.schemes.labels import scheme_label
from quantkit_kernels import w4a8, w8a8_fp8, w8a8_int8, weight_only
from quantkit_kernels.capability import capability, converts_float8
from quantkit_kernels.catalog import CHANNEL, TENSOR, Tile, UnsupportedError, WeightFormat, find_gpu
from quantkit_kernels.family import Family
from quantkit_kernels.row_codes import Codes

FIXED_ROWS = 32  # of a product of codes that no batch changes
FP8_INPUT = ("w8a8_fp8", "w8a8_fp8_block")  # the other families take zero points of x


class GpuLinear:
    """y = x · wᵀ + b, the weight in the layout of its family, whose routes take any number of rows."""

    def __init__(self, part: LinearPart, target: Target) -> None:
        family = family_of(part.name, part.scheme, target)
        self.family, self.target = family.name, target
        self.input_codes = _input_codes(part, target)
        self.shape = tuple(
            part.weight.shape if isinstance(part.weight, Tensor) else part.weight.codes_NK.shape
        )
        self.weight = family.prepare(part.weight)
        self.bias = part.bias_N

    def __call__(self, x: Rows) -> Tensor:
        """[T, K] to [T, N], in the dtype of the model."""
        codes, target = self.input_codes, self.target
        if codes is None:
            assert isinstance(x, Tensor), "codes for a linear that reads none"
            return weight_only.multiply(x, self.weight, self.bias, batch_invariant=target.batch_invariant)
        rows = encode(x, codes) if isinstance(x, Tensor) else x
        if not target.batch_invariant:
            return self._product(rows)
        return torch.cat([self._product(part)[:number] for number, part in _in_fixed_rows(rows)])

    def _product(self, rows: CodedRows) -> Tensor:
        codes, dtype = self.input_codes, self.target.dtype
        assert codes is not None, "the weight alone is quantized"
        scale = rows.scale_TG if codes.static_scale is None else codes.static_scale
        if self.family in FP8_INPUT:
            return w8a8_fp8.multiply(rows.codes_TK, scale, self.weight, self.bias, dtype)
        multiply = w8a8_int8.multiply if self.family == "w8a8_int8" else w4a8.multiply
        return multiply(rows.codes_TK, scale, codes.zero_point, self.weight, self.bias, dtype)

    def __repr__(self) -> str:
        """Shape and kernels."""
        return f"{self.shape[1]} -> {self.shape[0]}, {self.family}"


def _in_fixed_rows(rows: CodedRows) -> Iterator[tuple[int, CodedRows]]:
    """Codes FIXED_ROWS at a time, the last filled up with zeros: for one number of rows each is computed alike."""
    for codes_TK, scale_TG in zip(*(torch.split(part, FIXED_ROWS) for part in rows), strict=True):
        number = len(codes_TK)
        missing = (0, 0, 0, FIXED_ROWS - number)
        filled = pad(codes_TK.view(torch.int8), missing).view(codes_TK.dtype)
        yield number, CodedRows(filled, pad(scale_TG, missing))


def family_of(name: str, scheme: Scheme | None, target: Target) -> Family:
    """The kernels for a linear. Raises SchemeError, naming it, scheme, device and what comes nearest."""
    activation = None if scheme is None else activation_on(scheme, target.device)
    input_dtype = target.dtype if activation is None else _code_dtype(activation)
    try:
        _, family = find_gpu(_format(scheme, target.dtype), input_dtype, capability(target.device))
    except UnsupportedError as error:
        label = "16 bits" if scheme is None else scheme_label(scheme)
        device = torch.cuda.get_device_name(target.device)
        raise SchemeError(
            f"{name} in {label} on {device}: no kernel; {error.reason}",
            fix="run it on the CPU, or quantize it to a format that the kernels have",
        ) from None
    return family


def activation_on(scheme: Scheme, device: torch.device) -> Spec | None:
    """How a linear's input is quantized on a device; None: not, which is so of FP8 where there are no instructions."""
    spec = scheme.activation
    return None if isinstance(spec, FloatSpec) and not converts_float8(device) else spec


def _format(scheme: Scheme | None, dtype: torch.dtype) -> WeightFormat:
    if scheme is None:
        return WeightFormat(16, dtype, TENSOR, False)
    spec = scheme.weight
    return WeightFormat(spec.bits, _code_dtype(spec), _tile(spec), not spec.symmetric)


def _tile(spec: Spec) -> Tile:
    match spec.granularity:
        case PerChannel():
            return CHANNEL
        case PerGroup(size):
            return (1, size)
        case PerBlock(rows, cols):
            return (rows, cols)
        case _:
            return TENSOR


def _code_dtype(spec: Spec) -> torch.dtype:
    return torch.float8_e4m3fn if isinstance(spec, FloatSpec) else torch.int8


def _input_codes(part: LinearPart, target: Target) -> Codes | None:
    spec = None if part.scheme is None else activation_on(part.scheme, target.device)
    if spec is None:
        return None
    group = spec.granularity.size if isinstance(spec.granularity, PerGroup) else 0
    static = part.input_qparams
    if static is None:
        return Codes(_code_dtype(spec), group)
    scale = static.scale.to(target.dtype).float()  # as it is used
    return Codes(_code_dtype(spec), group, scale, static.zero_point)
