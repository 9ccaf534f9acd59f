"""Whether the stored tensors of one linear are what its scheme says, to the last bit.

Three questions in turn: are all tensors there, with the right dtype and shape and no other ones; are the
numbers in them possible; does the `compressed_tensors` package read the same weights out of them as we do.
The second is asked only if the first found nothing, the third only if the second did not.

Reads a linear's tensors once and goes through them in rows, so the peak is its stored size plus a few chunks.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from torch import Tensor

from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.compressed_tensors import Layout, decode_linear, format_name, linear_layout
from quantkit.formats.quantization_config import write_quantization
from quantkit.schemes import IntSpec, PerGroup, PerTensor, Scheme
from quantkit.schemes.tiles import dequantize_weight

SCALES = {"weight_scale", "input_scale"}
QUANTIZED_SUFFIXES = {
    "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_global_scale", "weight_g_idx",
    "input_scale", "input_zero_point", "input_global_scale",
}  # fmt: skip
CHUNK_ELEMENTS = 1 << 22
ROW_STEP = 128  # a multiple of every block's rows and of the zero points in a word


class Finding(NamedTuple):
    """Something wrong: in which tensor or file, what was found, what was expected."""

    place: str
    found: str
    expected: str


def check_linear(checkpoint: Checkpoint, module: str, scheme: Scheme) -> list[Finding]:
    """Everything wrong with one quantized linear; empty if the package reads the same bits as we do."""
    names = stored_suffixes(checkpoint, module)
    shape = stored_shape(checkpoint, module, scheme)
    if shape is None:
        carrier = "weight_packed" if format_name(scheme) == "pack-quantized" else "weight"
        if carrier not in names:
            return [Finding(f"{module}.{carrier}", "missing", "the codes of a quantized linear")]
        return [
            Finding(f"{module}.{carrier}", _describe(checkpoint, f"{module}.{carrier}"), "two dimensions")
        ]
    layout = linear_layout(scheme, *shape, torch.bfloat16)
    findings = list(_check_layout(checkpoint, module, layout, names))
    if findings:
        return findings
    tensors = {  # one scale may be stored as a 0-d tensor
        suffix: checkpoint.read(f"{module}.{suffix}").reshape(shape) for suffix, (_, shape) in layout.items()
    }
    findings = [
        Finding(f"{module}.{suffix}", found, expected)
        for suffix, found, expected in _check_values(tensors, scheme, shape)
    ]
    return findings or list(_compare(module, tensors, scheme, shape))


def stored_suffixes(checkpoint: Checkpoint, module: str) -> set[str]:
    """The names below the module of all tensors that a linear could have."""
    known = QUANTIZED_SUFFIXES | {"weight", "bias"}
    return {suffix for suffix in known if f"{module}.{suffix}" in checkpoint.tensors}


def stored_shape(checkpoint: Checkpoint, module: str, scheme: Scheme) -> tuple[int, int] | None:
    """[N, K] as the codes imply it; None if there are none, or not in two dimensions."""
    is_packed = format_name(scheme) == "pack-quantized"
    info = checkpoint.tensors.get(f"{module}.weight_packed" if is_packed else f"{module}.weight")
    if info is None or len(info.shape) != 2 or 0 in info.shape:
        return None
    num_rows, width = info.shape
    if not is_packed:
        return num_rows, width
    granularity = scheme.weight.granularity
    shape = checkpoint.tensors.get(f"{module}.weight_shape")
    most = width * 32 // scheme.weight.bits
    if isinstance(granularity, PerGroup):
        num_groups = max(most // granularity.size, 1)  # whole groups end on whole words
        return num_rows, num_groups * granularity.size
    if shape is None or shape.shape != (2,):
        return num_rows, most
    num_cols = int(checkpoint.read(shape.name)[1])
    fits = 0 < num_cols <= most and most - num_cols < 32 // scheme.weight.bits
    return num_rows, num_cols if fits else most


def _check_layout(checkpoint: Checkpoint, module: str, layout: Layout, names: set[str]) -> Iterator[Finding]:
    for suffix, (dtype, shape) in layout.items():
        name = f"{module}.{suffix}"
        wanted = f"{'a floating dtype' if suffix in SCALES else _short(dtype)} {list(shape)}"
        if suffix not in names:
            yield Finding(name, "missing", wanted)
            continue
        info = checkpoint.info(name)
        is_floating = info.dtype in (torch.float32, torch.bfloat16, torch.float16)
        is_scalar = suffix in SCALES and shape == (1,) and info.shape == ()
        if not (is_floating if suffix in SCALES else info.dtype == dtype) or not (
            info.shape == shape or is_scalar
        ):
            yield Finding(name, _describe(checkpoint, name), wanted)
    for suffix in sorted(names - layout.keys() - {"bias"}):
        name = f"{module}.{suffix}"
        yield Finding(
            name, _describe(checkpoint, name), f"no such tensor: this linear has {', '.join(layout)}"
        )


def _check_values(
    tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]
) -> Iterator[tuple[str, str, str]]:
    """Suffix, finding and expectation of every number that cannot be."""
    weight = scheme.weight
    for suffix in sorted(SCALES & tensors.keys()):
        scale = tensors[suffix].float()
        # A negative weight scale turns the long side of a symmetric integer grid around, and is legal.
        may_be_negative = suffix == "weight_scale" and isinstance(weight, IntSpec) and weight.symmetric
        bad = ~torch.isfinite(scale) | (scale == 0 if may_be_negative else scale <= 0)
        if bad.any():
            first = scale[bad].flatten()[0].item()
            expected = "finite and not 0" if may_be_negative else "finite and greater than 0"
            yield (
                suffix,
                f"{int(bad.sum())} of {scale.numel()} scales are impossible, first {first}",
                expected,
            )
    if "weight_shape" in tensors and tensors["weight_shape"].tolist() != list(shape):
        yield (
            "weight_shape",
            str(tensors["weight_shape"].tolist()),
            f"{list(shape)}, as the packed codes imply",
        )
    if "weight_packed" in tensors and _tail(tensors["weight_packed"][:, -1], shape[1] * weight.bits).any():
        yield "weight_packed", "bits set beyond the last code of a row", "unused high bits 0"
    if (
        "weight_zero_point" in tensors
        and _tail(tensors["weight_zero_point"][-1], shape[0] * weight.bits).any()
    ):
        yield "weight_zero_point", "bits set beyond the last output", "unused high bits 0"
    codes = tensors.get("weight")
    if codes is not None and codes.dtype == torch.float8_e4m3fn:
        count = int(((codes.view(torch.uint8) & 0x7F) == 0x7F).sum())
        if count:
            yield "weight", f"{count} codes are NaN", "finite e4m3 numbers"
    elif codes is not None and isinstance(weight, IntSpec):
        low, high = int(codes.min()), int(codes.max())
        if low < weight.qmin or high > weight.qmax:
            yield "weight", f"codes from {low} to {high}", f"codes from {weight.qmin} to {weight.qmax}"


def _tail(words: Tensor, num_bits: int) -> Tensor:
    """The unused high bits of the last word of each bit stream."""
    used = num_bits % 32 or 32
    return (words.to(torch.int64) & 0xFFFFFFFF) >> used


def _compare(
    module: str, tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]
) -> Iterator[Finding]:
    """Our weights, rounded once to the scale's dtype, against the package's."""
    package_config = QuantizationConfig.model_validate(write_quantization({module: scheme}, None))
    reference = package_config.config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(format_name(scheme))
    step = max(1, CHUNK_ELEMENTS // shape[1] // ROW_STEP) * ROW_STEP
    different = 0
    for start in range(0, shape[0], step):
        part = _rows(tensors, scheme, start, min(start + step, shape[0]))
        theirs = compressor.decompress(dict(part), reference)["weight"]
        linear = decode_linear(part, scheme)
        ours = dequantize_weight(linear.codes_NK, scheme.weight.granularity, linear.qparams).to(theirs.dtype)
        different += int((ours != theirs).sum())
    if different:
        expected = "the weights that compressed_tensors reads, bit for bit"
        yield Finding(f"{module}.weight", f"{different} weights differ", expected)


def _rows(tensors: Mapping[str, Tensor], scheme: Scheme, start: int, stop: int) -> dict[str, Tensor]:
    """The tensors of a linear that is rows [start, stop) of this one; start is a multiple of ROW_STEP."""
    part = dict(tensors)
    carrier = "weight_packed" if "weight_packed" in part else "weight"
    total = part[carrier].shape[0]
    part[carrier] = part[carrier][start:stop]
    if not isinstance(scheme.weight.granularity, PerTensor):
        rows_per_scale = -(-total // part["weight_scale"].shape[0])
        rows_per_scale = ROW_STEP if rows_per_scale > 1 else 1
        part["weight_scale"] = part["weight_scale"][start // rows_per_scale : -(-stop // rows_per_scale)]
    if "weight_zero_point" in part:
        per_word = 32 // scheme.weight.bits
        part["weight_zero_point"] = part["weight_zero_point"][start // per_word : -(-stop // per_word)]
    if "weight_shape" in part:
        part["weight_shape"] = torch.tensor([stop - start, int(part["weight_shape"][1])])
    return part


def _describe(checkpoint: Checkpoint, name: str) -> str:
    info = checkpoint.info(name)
    return f"{_short(info.dtype)} {list(info.shape)}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
