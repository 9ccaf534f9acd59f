"""Linears on a GPU: each through the catalog of kernels, with its input in 16 bits or as the codes they multiply.

Devices without FP8 instructions take FP8 inputs in 16 bits: the weight alone stays quantized.
Shape suffixes: T tokens, N out_features, K in_features.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from quantkit.errors import SchemeError
from quantkit.runtime.layers.linear_part import LinearPart
from quantkit.runtime.layers.rows import Rows, encode
from quantkit.runtime.target import Target
from quantkit.schemes import FloatSpec, PerBlock, PerChannel, PerGroup, Scheme, Spec
from quantkit.schemes.labels import scheme_label
from quantkit_kernels.capability import capability, converts_float8
from quantkit_kernels.catalog import CHANNEL, TENSOR, Tile, UnsupportedError, WeightFormat, find_gpu
from quantkit_kernels.family import Family
from quantkit_kernels.product import multiply, prepare
from quantkit_kernels.row_codes import Codes


class GpuLinear:
    """y = x · wᵀ + b, the weight in the layout of its family, whose routes take any number of rows."""

    def __init__(self, part: LinearPart, target: Target) -> None:
        self.family, self.dtype = family_of(part.name, part.scheme, target).name, target.dtype
        self.input_codes = _input_codes(part, target)
        self.shape = tuple(
            part.weight.shape if isinstance(part.weight, Tensor) else part.weight.codes_NK.shape
        )
        input_dtype = target.dtype if self.input_codes is None else self.input_codes.dtype
        self.weight = prepare(
            part.weight, input_dtype, capability(target.device), batch_invariant=target.batch_invariant
        )
        self.bias = part.bias_N

    def __call__(self, x: Rows) -> Tensor:
        """[T, K] to [T, N], in the dtype of the model."""
        codes = self.input_codes
        if codes is None:
            assert isinstance(x, Tensor), "codes for a linear that reads none"
            return multiply(x, self.weight, bias_N=self.bias)
        rows = encode(x, codes) if isinstance(x, Tensor) else x
        return multiply(
            rows.codes_TK,
            self.weight,
            bias_N=self.bias,
            x_scale=rows.scale_TG if codes.static_scale is None else codes.static_scale,
            x_zero_point=codes.zero_point,
            out_dtype=self.dtype,
        )

    def __repr__(self) -> str:
        """Shape and kernels."""
        return f"{self.shape[1]} -> {self.shape[0]}, {self.family}"


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


def inputs_kept_in_16_bits(schemes: Iterable[Scheme], target: Target) -> list[str]:
    """The schemes, by label, whose inputs the device's kernels do not quantize although the checkpoint says so."""
    kept = [
        scheme for scheme in schemes if scheme.activation and activation_on(scheme, target.device) is None
    ]
    return sorted({scheme_label(scheme) for scheme in kept}) if target.has_kernels else []


def kept_bits(spec: Spec) -> int:
    """Of a code as the kernels keep it: INT2 in INT4."""
    return 4 if spec.bits <= 4 else 8


def _format(scheme: Scheme | None, dtype: torch.dtype) -> WeightFormat:
    if scheme is None:
        return WeightFormat(16, dtype, TENSOR, False)
    spec = scheme.weight
    return WeightFormat(kept_bits(spec), _code_dtype(spec), _tile(spec), not spec.symmetric)


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
