"""The compressed-tensors layout of one quantized linear: which tensors it has, and codes <-> those tensors.

Knows nothing of config.json (`quantization_config`) or of files. Codes are stored as they were chosen.
Layouts, for a linear [N, K] with prefix `<module>.`:

    pack-quantized    weight_packed I32 [N, K·b/32], weight_shape I64 [2], weight_scale,
                      asymmetric: weight_zero_point I32 [ceil(N·b/32), G]
    int-quantized     weight I8 [N, K], weight_scale; static input: input_scale [1],
                      asymmetric: input_zero_point I8 [1]
    float-quantized   weight F8_E4M3 [N, K], weight_scale; static input: input_scale [1]
    naive-quantized   as float-quantized, no input tensors
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.errors import SourceError
from quantkit.formats.checkpoint import Checkpoint
from quantkit.numerics.packing import pack, packed_width, unpack
from quantkit.schemes import FloatSpec, IntSpec, PerGroup, QParams, Scheme
from quantkit.schemes.tiles import scale_shape

# Tensor suffix -> dtype and shape, in the order on disk.
Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


class StoredLinear(NamedTuple):
    """One quantized linear as its checkpoint holds it.

    codes_NK: int8 or float8_e4m3fn. qparams: in the dtype and shape on disk. input_qparams: of a static
    activation scale ([1]), else None.
    """

    codes_NK: Tensor
    qparams: QParams
    input_qparams: QParams | None = None


def format_name(scheme: Scheme) -> str:
    """The `format` of compressed-tensors that stores this scheme."""
    if isinstance(scheme.weight, FloatSpec):
        return "naive-quantized" if scheme.activation is None else "float-quantized"
    # The package would store INT4 weights with FP8 activations as int-quantized, but vLLM reads that
    # combination only in its packed form, and transformers accepts both.
    return "int-quantized" if isinstance(scheme.activation, IntSpec) else "pack-quantized"


def linear_layout(scheme: Scheme, num_rows: int, num_cols: int, scale_dtype: torch.dtype) -> Layout:
    """Names, dtypes and shapes of the tensors that store a linear [num_rows, num_cols]."""
    weight = scheme.weight
    scale = (scale_dtype, scale_shape(weight.granularity, num_rows, num_cols))
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    if format_name(scheme) == "pack-quantized":
        assert isinstance(weight, IntSpec), "FP8 codes are not packed"
        layout["weight_packed"] = (torch.int32, (num_rows, packed_width(num_cols, weight.bits)))
        layout["weight_scale"] = scale
        layout["weight_shape"] = (torch.int64, (2,))
        if not weight.symmetric:
            layout["weight_zero_point"] = (torch.int32, (packed_width(num_rows, weight.bits), scale[1][1]))
        return layout
    code_dtype = torch.int8 if isinstance(weight, IntSpec) else torch.float8_e4m3fn
    layout["weight"] = (code_dtype, (num_rows, num_cols))
    layout["weight_scale"] = scale
    if scheme.is_static:
        assert scheme.activation is not None, "static means that there is an input spec"
        layout["input_scale"] = (scale_dtype, (1,))
        if not scheme.activation.symmetric:
            layout["input_zero_point"] = (torch.int8, (1,))
    return layout


def encode_linear(linear: StoredLinear, scheme: Scheme) -> dict[str, Tensor]:
    """The tensors to store, by suffix, in the order of `linear_layout`."""
    scale, zero_point = linear.qparams
    tensors: dict[str, Tensor]
    if format_name(scheme) == "pack-quantized":
        bits = scheme.weight.bits
        tensors = {
            "weight_packed": pack(linear.codes_NK, bits),
            "weight_scale": scale,
            "weight_shape": torch.tensor(linear.codes_NK.shape, dtype=torch.int64),
        }
        if zero_point is not None:
            tensors["weight_zero_point"] = _transposed(pack(_transposed(zero_point), bits))
        return tensors
    tensors = {"weight": linear.codes_NK, "weight_scale": scale}
    if scheme.is_static:
        assert linear.input_qparams is not None, "a static scheme comes with its input scale"
        tensors["input_scale"] = linear.input_qparams.scale
        if linear.input_qparams.zero_point is not None:
            tensors["input_zero_point"] = linear.input_qparams.zero_point
    return tensors


def decode_linear(tensors: Mapping[str, Tensor], scheme: Scheme) -> StoredLinear:
    """The inverse of `encode_linear`."""
    input_qparams = None
    if scheme.is_static:
        input_qparams = QParams(tensors["input_scale"], tensors.get("input_zero_point"))
    if format_name(scheme) != "pack-quantized":
        return StoredLinear(tensors["weight"], QParams(tensors["weight_scale"]), input_qparams)
    num_rows, num_cols = tensors["weight_shape"].tolist()
    bits = scheme.weight.bits
    zero_point = None
    if "weight_zero_point" in tensors:
        zero_point = _transposed(unpack(_transposed(tensors["weight_zero_point"]), bits, num_rows))
    codes_NK = unpack(tensors["weight_packed"], bits, num_cols)
    return StoredLinear(codes_NK, QParams(tensors["weight_scale"], zero_point), input_qparams)


def read_linear(checkpoint: Checkpoint, module: str, scheme: Scheme) -> StoredLinear:
    """One linear of an opened checkpoint.

    Raises SourceError, naming the tensor, if one is missing or has not the dtype and shape that the scheme
    gives it (a scale may have any floating dtype).
    """
    num_rows, num_cols = _stored_shape(checkpoint, module, scheme)
    tensors: dict[str, Tensor] = {}
    for suffix, (dtype, shape) in linear_layout(scheme, num_rows, num_cols, torch.bfloat16).items():
        tensor = checkpoint.read(f"{module}.{suffix}")
        is_scale = suffix in {"weight_scale", "input_scale"}
        dtype_fits = tensor.dtype.is_floating_point if is_scale else tensor.dtype == dtype
        if is_scale and tensor.numel() == 1 and shape == (1,):
            tensor = tensor.reshape(1)  # some writers store one scale as a 0-d tensor
        if not dtype_fits or tuple(tensor.shape) != shape:
            raise SourceError(
                f"{checkpoint.path}: {module}.{suffix} is {tensor.dtype} {list(tensor.shape)}, "
                f"but its scheme in config.json makes it {dtype} {list(shape)}",
                fix="config.json and the weights are not of one version: fetch or quantize again",
            )
        tensors[suffix] = tensor
    return decode_linear(tensors, scheme)


def _transposed(tensor: Tensor) -> Tensor:
    # .T.contiguous() keeps odd strides on a single column, and such a tensor cannot be viewed as bytes.
    return tensor.T.clone(memory_format=torch.contiguous_format)


def _stored_shape(checkpoint: Checkpoint, module: str, scheme: Scheme) -> tuple[int, int]:
    if format_name(scheme) != "pack-quantized":
        stored = list(checkpoint.info(f"{module}.weight").shape)
    elif checkpoint.info(f"{module}.weight_shape").shape == (2,):
        stored = [int(extent) for extent in checkpoint.read(f"{module}.weight_shape").tolist()]
    else:
        stored = []
    granularity = scheme.weight.granularity
    group = granularity.size if isinstance(granularity, PerGroup) else 1
    if len(stored) != 2 or min(stored) < 1 or stored[1] % group:
        raise SourceError(
            f"{checkpoint.path}: {module} has the stored shape {stored}, which its scheme cannot have",
            fix="the checkpoint is damaged: fetch or quantize it again",
        )
    return stored[0], stored[1]
