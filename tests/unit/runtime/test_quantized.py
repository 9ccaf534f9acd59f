"""Quantized linears and caches: every scheme against the dequantized weight, and whole models against transformers."""

import pytest
import torch

from quantkit.runtime.layers.linear import QuantLinear
from quantkit.runtime.layers.linear_part import quantized_part
from quantkit.runtime.load import load_model
from quantkit.schemes import FloatSpec, IntSpec, KVScheme, PerChannel, PerGroup, PerTensor, PerToken, Scheme
from quantkit.schemes.activation import fake_quantize_input
from quantkit.schemes.tiles import dequantize_weight
from tests.product_schemes import SCHEMES
from tests.tiny_models import quantize_tiny, reference_logits, round_to_nearest, save_tiny, tokens


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_equals_its_dequantized_weight(name, dtype):
    scheme = SCHEMES[name]
    random = torch.Generator().manual_seed(1)
    w_NK, bias = torch.randn(144, 256, generator=random), torch.randn(144, generator=random).to(dtype)
    stored = round_to_nearest(w_NK, scheme)
    linear = QuantLinear(quantized_part("linear", stored, scheme, bias), dtype=dtype)
    dense = dequantize_weight(stored.codes_NK, scheme.weight.granularity, stored.qparams)
    for num_tokens in (1, 7, 40):
        x = torch.randn(num_tokens, 256, generator=random).to(dtype)
        seen = (
            x
            if scheme.activation is None
            else fake_quantize_input(x, scheme.activation, stored.input_qparams)
        )
        expected = seen.double() @ dense.double().T + bias.double()
        y = linear(x)
        assert y.dtype == dtype
        # a weight, a product's input (integer kernels skip that rounding) and the result are rounded to dtype
        assert relative(y, expected) < 3 * torch.finfo(dtype).eps


def test_a_quantized_linear_keeps_no_dense_copy():
    w_NK = torch.randn(512, 512)
    dense_bytes = w_NK.numel() * 2
    for name, most in (
        ("int4-g64-sym", 0.56),
        ("int8-channel-sym", 0.51),
        ("fp8-channel-token", 0.51),
        ("int2-g64-sym", 0.16),
    ):
        part = quantized_part(name, round_to_nearest(w_NK, SCHEMES[name]), SCHEMES[name], None)
        linear = QuantLinear(part, dtype=torch.bfloat16)
        assert linear.num_bytes <= most * dense_bytes, name


SAFE = {  # what transformers loads by default, one of each kind
    "int4": Scheme(weight=IntSpec(bits=4, granularity=PerGroup(32))),
    "int8-weight": Scheme(weight=IntSpec(bits=8, granularity=PerChannel())),
    "int8": SCHEMES["int8-w8a8-dynamic"],
    "int8-static": SCHEMES["int8-w8a8-static-sym"],
    "int8-static-asym": SCHEMES["int8-w8a8-static-asym"],
    "fp8": SCHEMES["fp8-channel-token"],
    "fp8-static": SCHEMES["fp8-tensor-static"],
    "fp8-weight": SCHEMES["fp8-channel-weight"],
    "fp8-block": SCHEMES["fp8-block"],
    "w4a8-fp8": Scheme(
        weight=IntSpec(bits=4, granularity=PerGroup(32)), activation=FloatSpec(granularity=PerToken())
    ),
}


@pytest.mark.parametrize("name", SAFE)
def test_a_quantized_model_gives_the_logits_of_transformers(name, tmp_path):
    source = save_tiny("llama-wide", tmp_path / "source", dtype=torch.bfloat16)
    folder = quantize_tiny(source, tmp_path / "quantized", SAFE[name])
    ids = tokens(30)
    ours = load_model(folder, dtype=torch.float32).logits(ids)
    assert relative(ours, reference_logits(folder, ids, torch.float32)) < 1e-5
    original = load_model(source, dtype=torch.float32).logits(ids)
    assert 1e-4 < relative(ours, original) < 1, "quantization shows, and is not the end of the model"


@pytest.mark.parametrize("granularity", ["tensor", "head"])
def test_an_fp8_cache_gives_the_logits_of_transformers(granularity, tmp_path):
    source = save_tiny("llama", tmp_path / "source", dtype=torch.bfloat16)
    kv = KVScheme(dtype="fp8", granularity=granularity)
    folder = quantize_tiny(source, tmp_path / "quantized", None, kv)
    ids = tokens(30)
    model = load_model(folder, dtype=torch.float32)
    assert {layer.dtype for layer in model.kv.layers} == {torch.float8_e4m3fn}
    ours = model.logits(ids)
    assert relative(ours, reference_logits(folder, ids, torch.float32)) < 1e-5
    assert relative(ours, load_model(source, dtype=torch.float32).logits(ids)) > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("spec", "args"),
    [
        (IntSpec(bits=8, granularity=PerToken()), {"type": "int", "strategy": "token", "dynamic": True}),
        (FloatSpec(granularity=PerToken()), {"type": "float", "strategy": "token", "dynamic": True}),
        (
            FloatSpec(granularity=PerGroup(128)),
            {"type": "float", "strategy": "group", "group_size": 128, "dynamic": True},
        ),
        (FloatSpec(granularity=PerTensor()), {"type": "float", "strategy": "tensor"}),
        (IntSpec(bits=8, granularity=PerTensor()), {"type": "int", "strategy": "tensor"}),
        (
            IntSpec(bits=8, granularity=PerTensor(), symmetric=False),
            {"type": "int", "strategy": "tensor", "symmetric": False},
        ),
    ],
)
def test_inputs_are_quantized_bit_for_bit_as_compressed_tensors_does(spec, args, dtype):
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    x = torch.randn(33, 256, generator=torch.Generator().manual_seed(2)).mul(3).to(dtype)
    x[4] = 0
    package_args = QuantizationArgs(num_bits=8, **args)
    static = None
    if args.get("dynamic"):
        scale, zero_point = compute_dynamic_scales_and_zp(x[None], package_args, torch.nn.Module())
    else:
        static = round_to_nearest(
            torch.zeros(1, 1), Scheme(weight=IntSpec(bits=8, granularity=PerChannel()), activation=spec)
        )
        static = static.input_qparams
        scale, zero_point = static.scale.to(dtype), static.zero_point
    expected = fake_quantize(x[None], scale, zero_point, package_args)[0]
    assert torch.equal(fake_quantize_input(x, spec, static), expected)
