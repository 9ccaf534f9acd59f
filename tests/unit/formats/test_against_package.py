"""Our bytes and the compressed_tensors package: the same weights, bit for bit, in both directions.

What that means: the package computes (code − zero_point) · scale in the dtype of the scale, we in float32.
Codes have at most 9 bits of mantissa and a bfloat16 or float16 scale 8 or 11, so our product is exact and,
rounded once to the scale's dtype, has to have the bits of the package's. With float32 scales no rounding is
left over: the tensors are equal as they are.
"""

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig

from quantkit.formats.compressed_tensors import (
    StoredLinear,
    decode_linear,
    encode_linear,
    format_name,
    linear_layout,
)
from quantkit.formats.quantization_config import write_quantization
from quantkit.formats.safetensors_file import as_bytes
from quantkit.numerics.packing import pack
from quantkit.schemes import FloatSpec, IntSpec, QParams
from quantkit.schemes.tiles import dequantize_weight, minmax_qparams, quantize_weight, scale_shape
from tests.product_schemes import SCHEMES

NUM_ROWS, NUM_COLS = 150, 384  # ragged for 128-row blocks and for packed zero points
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def their_scheme(scheme):
    config = QuantizationConfig.model_validate(write_quantization({"m": scheme}, None))
    return config.config_groups["group_0"]


def compressor(scheme):
    return BaseCompressor.get_value_from_registry(format_name(scheme))


def random_codes(spec, shape, generator):
    return torch.randint(spec.qmin, spec.qmax + 1, shape, generator=generator).to(torch.int8)


def random_linear(scheme, dtype):
    """Random codes over the whole grid, random scales and zero points: more than a weight would give."""
    generator = torch.Generator().manual_seed(0)
    spec, shape = scheme.weight, scale_shape(scheme.weight.granularity, NUM_ROWS, NUM_COLS)
    scale = (torch.rand(shape, generator=generator) + 0.01).to(dtype)
    zero_point = input_qparams = None
    if isinstance(spec, IntSpec):
        codes_NK = random_codes(spec, (NUM_ROWS, NUM_COLS), generator)
        zero_point = None if spec.symmetric else random_codes(spec, shape, generator)
    else:
        codes_NK = (torch.randn(NUM_ROWS, NUM_COLS, generator=generator) * 100).clamp(-448, 448)
        codes_NK = codes_NK.to(torch.float8_e4m3fn)
    if scheme.is_static:
        input_zero_point = None if scheme.activation.symmetric else torch.tensor([3], dtype=torch.int8)
        input_qparams = QParams(torch.tensor([0.1], dtype=dtype), input_zero_point)
    return StoredLinear(codes_NK, QParams(scale, zero_point), input_qparams)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_the_package_decompresses_our_tensors_to_our_weights(name, dtype):
    scheme = SCHEMES[name]
    linear = random_linear(scheme, dtype)
    theirs = compressor(scheme).decompress(encode_linear(linear, scheme), their_scheme(scheme))["weight"]
    ours = dequantize_weight(linear.codes_NK, scheme.weight.granularity, linear.qparams)
    assert theirs.dtype == dtype
    assert ours.dtype == torch.float32
    assert torch.equal(theirs, ours.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_the_package_compresses_a_weight_to_our_bytes(name, dtype):
    scheme = SCHEMES[name]
    w_NK = torch.randn(NUM_ROWS, NUM_COLS, generator=torch.Generator().manual_seed(1)) - 0.2
    qparams = minmax_qparams(w_NK, scheme.weight, dtype)
    linear = random_linear(scheme, dtype)._replace(
        codes_NK=quantize_weight(w_NK, scheme.weight, qparams), qparams=qparams
    )
    ours = encode_linear(linear, scheme)
    given = {"weight": w_NK, "weight_scale": qparams.scale}
    if qparams.zero_point is not None:
        given["weight_zero_point"] = qparams.zero_point
    given |= {suffix: tensor for suffix, tensor in ours.items() if suffix.startswith("input_")}
    theirs = compressor(scheme).compress(given, their_scheme(scheme))
    assert theirs.keys() == ours.keys() == linear_layout(scheme, NUM_ROWS, NUM_COLS, dtype).keys()
    for suffix, tensor in ours.items():
        assert theirs[suffix].dtype == tensor.dtype and theirs[suffix].shape == tensor.shape, suffix
        assert bytes(as_bytes(theirs[suffix])) == bytes(as_bytes(tensor)), suffix


@pytest.mark.parametrize(
    "name", [name for name, scheme in SCHEMES.items() if format_name(scheme) == "pack-quantized"]
)
def test_what_the_package_packs_we_unpack(name):
    scheme = SCHEMES[name]
    linear = random_linear(scheme, torch.float32)
    w_NK = dequantize_weight(linear.codes_NK, scheme.weight.granularity, linear.qparams)
    given = {"weight": w_NK, "weight_scale": linear.qparams.scale}
    if linear.qparams.zero_point is not None:
        given["weight_zero_point"] = linear.qparams.zero_point
    read = decode_linear(compressor(scheme).compress(given, their_scheme(scheme)), scheme)
    assert torch.equal(read.codes_NK, linear.codes_NK)
    if linear.qparams.zero_point is not None:
        assert torch.equal(read.qparams.zero_point, linear.qparams.zero_point)


def test_every_code_of_every_grid_comes_back():
    for name in ("int2-channel-asym", "int4-channel-asym", "int8-channel-asym", "int8-w8a8-dynamic"):
        scheme = SCHEMES[name]
        codes_NK = torch.arange(scheme.weight.qmin, scheme.weight.qmax + 1).to(torch.int8).repeat(3, 1)
        zero_point = None
        if not scheme.weight.symmetric:
            zero_point = torch.tensor([[scheme.weight.qmin], [0], [scheme.weight.qmax]], dtype=torch.int8)
        linear = StoredLinear(codes_NK, QParams(torch.tensor([[0.5], [1.0], [3.0]]), zero_point))
        theirs = compressor(scheme).decompress(encode_linear(linear, scheme), their_scheme(scheme))["weight"]
        assert torch.equal(theirs, dequantize_weight(codes_NK, scheme.weight.granularity, linear.qparams))


def test_every_finite_e4m3_code_comes_back():
    bits = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    scheme = SCHEMES["fp8-channel-token"]
    linear = StoredLinear(bits.view(torch.float8_e4m3fn).view(1, -1), QParams(torch.tensor([[0.37]])))
    theirs = compressor(scheme).decompress(encode_linear(linear, scheme), their_scheme(scheme))["weight"]
    ours = dequantize_weight(linear.codes_NK, scheme.weight.granularity, linear.qparams)
    assert torch.equal(theirs.view(torch.int32), ours.view(torch.int32))  # −0 included


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packed_words_are_the_packages(bits):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    codes_NK = random_linear(SCHEMES[f"int{bits}-channel-sym"], torch.float32).codes_NK
    for width in (1, 7, 31, 32, 33, NUM_COLS):
        narrow = codes_NK[:, :width].contiguous()
        assert torch.equal(pack(narrow, bits), pack_to_int32(narrow, bits))
        assert torch.equal(pack(narrow.T.contiguous(), bits).T, pack_to_int32(narrow, bits, packed_dim=0))


@pytest.mark.parametrize("name", SCHEMES)
def test_the_package_infers_the_format_we_write(name):
    """But for INT4 weights with FP8 activations, which it would not pack; vLLM needs them packed."""
    from compressed_tensors.compressors.format import infer_module_format

    inferred = infer_module_format(torch.nn.Linear, their_scheme(SCHEMES[name])).value
    mixes = isinstance(SCHEMES[name].weight, IntSpec) and isinstance(SCHEMES[name].activation, FloatSpec)
    assert inferred == ("int-quantized" if mixes else format_name(SCHEMES[name]))
