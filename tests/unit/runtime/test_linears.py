"""Linears of one input as one product where their formats allow, and side by side where not."""

import pytest
import torch

from quantkit.runtime.layers.build_linear import build_linear
from quantkit.runtime.layers.linear import InFixedRows, QuantLinear, SideBySide
from quantkit.runtime.layers.linear_part import LinearPart, join, quantized_part
from quantkit.runtime.target import Target
from quantkit.schemes import PerBlock, QParams
from tests.product_schemes import SCHEMES
from tests.tiny_models import round_to_nearest

CPU = torch.device("cpu")
ROWS = {"q": 256, "k": 128, "v": 128}


def part(name, scheme=None, *, rows=128, bias=False, seed=0, input_scale=0.05):
    random = torch.Generator().manual_seed(seed + rows)
    w_NK, bias_N = torch.randn(rows, 256, generator=random), torch.randn(rows, generator=random)
    if scheme is None:
        return LinearPart(name, w_NK, bias_N=bias_N if bias else None)
    stored = round_to_nearest(w_NK, SCHEMES[scheme], input_scale)
    return quantized_part(name, stored, SCHEMES[scheme], bias_N if bias else None)


@pytest.mark.parametrize("scheme", [None, *SCHEMES])
@pytest.mark.parametrize("bias", [False, True])
def test_equal_formats_are_one_product_with_the_same_result(scheme, bias):
    parts = [part(name, scheme, rows=rows, bias=bias, seed=ord(name)) for name, rows in ROWS.items()]
    target = Target(CPU, torch.float32)
    together = build_linear(parts, target)
    assert not isinstance(together, SideBySide)
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(3))
    apart = torch.cat([build_linear([one], target)(x) for one in parts], dim=1)
    assert torch.allclose(together(x), apart, rtol=1e-5, atol=1e-5)


def test_a_joined_linear_names_all_of_it():
    parts = [part(f"model.layers.0.self_attn.{name}_proj") for name in "qkv"]
    assert join(parts)[0].name == "model.layers.0.self_attn.q_proj, k_proj, v_proj"


DIFFERENT = {
    "schemes": [part("a", "int4-g64-sym"), part("b", "int8-channel-sym")],
    "one in 16 bits": [part("a", "int4-g64-sym"), part("b")],
    "static scales": [part("a", "fp8-tensor-static"), part("b", "fp8-tensor-static", input_scale=0.07)],
    "a tile cut in two": [part("a", "fp8-block", rows=192), part("b", "fp8-block")],
    "a bias": [part("a", bias=True), part("b")],
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_one_product_cannot_have_stays_apart(name):
    parts = DIFFERENT[name]
    assert join(parts) == parts
    linear = build_linear(parts, Target(CPU, torch.float32))
    assert isinstance(linear, SideBySide)
    x = torch.randn(5, 256)
    apart = [build_linear([one], Target(CPU, torch.float32))(x) for one in parts]
    assert torch.equal(linear(x), torch.cat(apart, dim=1))


def test_neighbours_are_joined_beside_one_that_differs():
    parts = [part("q", "int4-g64-sym"), part("k", "int4-g64-sym"), part("v", "int8-channel-sym")]
    assert [one.name for one in join(parts)] == ["q, k", "v"]


def test_a_last_block_may_be_cut():
    parts = [part("a", "fp8-block"), part("b", "fp8-block", rows=192)]
    (joined,) = join(parts)
    assert joined.scheme is not None and joined.scheme.weight.granularity == PerBlock(128, 128)
    assert joined.weight.codes_NK.shape == (320, 256)
    assert joined.weight.scale_RG.shape == (3, 2)


def test_static_zero_points_have_to_agree():
    first, second = part("a", "int8-w8a8-static-asym"), part("b", "int8-w8a8-static-asym")
    assert len(join([first, second])) == 1
    scale, zero_point = second.input_qparams
    moved = second._replace(input_qparams=QParams(scale, zero_point + 1))
    assert len(join([first, moved])) == 2


@pytest.mark.parametrize("scheme", [None, "int4-g64-asym", "int8-w8a8-dynamic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_that_no_batch_changes(scheme, dtype):
    one = part("a", scheme)
    if scheme is None:
        one = one._replace(weight=one.weight.to(dtype))
    linear = build_linear([one], Target(CPU, dtype, batch_invariant=True))
    assert isinstance(linear, InFixedRows)
    x = torch.randn(40, 256).to(dtype)
    together = linear(x)
    for rows in (slice(0, 1), slice(7, 20), slice(20, 40)):
        assert torch.equal(linear(x[rows]), together[rows])


def test_a_quantized_linear_says_its_kernels():
    linear = build_linear([part("a", "int4-g64-sym")], Target(CPU, torch.bfloat16))
    assert isinstance(linear, QuantLinear)
    assert repr(linear) == "256 -> 128, int4pack, dequantize"
