"""The linears of a GPU on a CPU, where the kernels' operators compute what they define; and what devices lack."""

import pytest
import torch

from quantkit.errors import SchemeError
from quantkit.formats.checkpoint import open_checkpoint
from quantkit.runtime.layers import gpu_linear
from quantkit.runtime.layers.gpu_linear import GpuLinear, family_of, inputs_kept_in_16_bits, kept_bits
from quantkit.runtime.layers.linear import SideBySide
from quantkit.runtime.layers.linear_part import LinearPart, join, quantized_part
from quantkit.runtime.layers.rows import encode
from quantkit.runtime.load import load_model
from quantkit.runtime.target import Target
from quantkit.schemes import IntSpec, PerGroup, Scheme
from quantkit.schemes.activation import fake_quantize_input
from quantkit.schemes.labels import scheme_label
from quantkit.schemes.tiles import dequantize_weight
from tests.product_schemes import SCHEMES
from tests.tiny_models import quantize_tiny, round_to_nearest, save_tiny

BF16 = Target(torch.device("cpu"), torch.bfloat16)


@pytest.fixture(autouse=True)
def device(monkeypatch):
    """An H100, or what a test makes of it."""

    def become(major, minor):
        monkeypatch.setattr(gpu_linear, "capability", lambda _: (major, minor))
        monkeypatch.setattr(gpu_linear, "converts_float8", lambda _: (major, minor) >= (8, 9))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: f"GPU {major}.{minor}")

    become(9, 0)
    return become


def stored_linear(name, *, rows=128, cols=256):
    random = torch.Generator().manual_seed(rows)
    return round_to_nearest(torch.randn(rows, cols, generator=random), SCHEMES[name])


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def test_devices_without_fp8_keep_such_inputs_in_16_bits_and_that_is_said(device):
    on_gpu = Target(torch.device("cuda"), torch.bfloat16)
    schemes = [SCHEMES[name] for name in ("fp8-channel-token", "fp8-channel-weight", "int8-w8a8-dynamic")]
    assert inputs_kept_in_16_bits(schemes, on_gpu) == []
    device(8, 0)
    assert inputs_kept_in_16_bits(schemes, on_gpu) == [scheme_label(schemes[0])]
    assert inputs_kept_in_16_bits(schemes, BF16) == [], "a CPU quantizes them itself"


def test_a_scheme_without_a_kernel_is_refused_before_anything_is_read(device, tmp_path, monkeypatch):
    source = save_tiny("llama", tmp_path / "source", dtype=torch.bfloat16)
    checkpoint = open_checkpoint(quantize_tiny(source, tmp_path / "out", SCHEMES["int8-channel-sym"]))
    monkeypatch.setattr(type(checkpoint), "read", lambda *_: pytest.fail("tensors are read"))
    device(7, 5)
    with pytest.raises(
        SchemeError, match=r"layers\.0\..*_proj in INT8 channel on GPU 7\.5: no kernel"
    ) as error:
        load_model(checkpoint, dtype=torch.bfloat16, device=torch.device("cuda"))
    assert "CPU" in error.value.fix


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_are_kept_in_as_many_bits_as_are_planned(bits):
    name = f"int{bits}-g64-sym"
    part = quantized_part("linear", stored_linear(name), SCHEMES[name], None)
    assert part.weight.stored_bits == kept_bits(SCHEMES[name].weight)


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_equals_its_dequantized_weight(name):
    scheme, stored = SCHEMES[name], stored_linear(name)
    bias = torch.randn(128).bfloat16()
    linear = GpuLinear(quantized_part("linear", stored, scheme, bias), BF16)
    dense = dequantize_weight(stored.codes_NK, scheme.weight.granularity, stored.qparams)
    x = torch.randn(9, 256).bfloat16()
    seen = x
    if scheme.activation is not None:
        seen = fake_quantize_input(x, scheme.activation, stored.input_qparams)
        assert linear.input_codes is not None
        assert torch.equal(linear(encode(x, linear.input_codes)), linear(x)), (
            "who makes the codes is all the same"
        )
    expected = seen.double() @ dense.double().T + bias.double()
    y = linear(x)
    assert y.dtype == torch.bfloat16
    assert relative(y, expected) < 3 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize(
    "name", [None, "int4-g128-sym", "fp8-channel-token", "fp8-block", "int8-w8a8-static-asym"]
)
def test_a_product_that_no_batch_changes(name):
    if name is None:
        part = LinearPart("linear", torch.randn(128, 256).bfloat16())
    else:
        part = quantized_part("linear", stored_linear(name), SCHEMES[name], None)
    linear = GpuLinear(part, BF16._replace(batch_invariant=True))
    x = torch.randn(40, 256).bfloat16()
    together = linear(x)
    assert relative(together, GpuLinear(part, BF16)(x)) < 1e-3
    for rows in (slice(0, 1), slice(7, 20), slice(20, 40)):
        assert torch.equal(linear(x[rows]), together[rows])


def test_linears_side_by_side_share_codes_that_both_read():
    parts = [
        quantized_part("q", stored_linear("w4a8-int8-g128"), SCHEMES["w4a8-int8-g128"], None),
        quantized_part("k", stored_linear("int8-w8a8-dynamic"), SCHEMES["int8-w8a8-dynamic"], None),
        quantized_part("v", stored_linear("fp8-channel-token"), SCHEMES["fp8-channel-token"], None),
    ]
    linears = [GpuLinear(part, BF16) for part in parts]
    x = torch.randn(5, 256).bfloat16()
    shared = SideBySide(linears[:2])
    assert shared.input_codes == linears[0].input_codes
    apart = torch.cat([linear(x) for linear in linears], dim=1)
    assert torch.equal(shared(encode(x, shared.input_codes)), apart[:, :256])
    assert SideBySide(linears).input_codes is None
    assert torch.equal(SideBySide(linears)(x), apart)


@pytest.mark.parametrize(
    "name", ["fp8-tensor-static", "int8-w8a8-static-asym", "fp8-block", "int4-channel-asym"]
)
def test_joined_linears_are_each_of_them(name):
    parts = [
        quantized_part(str(rows), stored_linear(name, rows=rows), SCHEMES[name], None)
        for rows in (128, 256, 96)
    ]
    (joined,) = join(parts)
    x = torch.randn(5, 256).bfloat16()
    apart = torch.cat([GpuLinear(part, BF16)(x) for part in parts], dim=1)
    assert torch.equal(GpuLinear(joined, BF16)(x), apart)


@pytest.mark.parametrize("name", ["fp8-channel-token", "fp8-block", "fp8-tensor-static", "w4a8-fp8-g64"])
def test_a_device_without_fp8_takes_inputs_in_16_bits(name, device):
    device(8, 0)
    scheme, stored = SCHEMES[name], stored_linear(name)
    linear = GpuLinear(quantized_part("linear", stored, scheme, None), BF16)
    assert linear.input_codes is None
    assert linear.family in ("w8a16", "w4a16")
    dense = dequantize_weight(stored.codes_NK, scheme.weight.granularity, stored.qparams)
    x = torch.randn(9, 256).bfloat16()
    assert relative(linear(x), x.double() @ dense.double().T) < 3 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("version", [(8, 0), (8, 9), (9, 0), (12, 0)])
def test_every_scheme_has_a_kernel(name, version, device):
    device(*version)
    family_of("mlp.down_proj", SCHEMES[name], BF16)


def test_what_has_no_kernel_is_refused_by_name(device):
    scheme = Scheme(weight=IntSpec(bits=8, granularity=PerGroup(16)))
    device(8, 0)
    with pytest.raises(
        SchemeError, match=r"down_proj in INT8 group 16 on GPU 8\.0: no kernel; w8a16 takes"
    ) as caught:
        family_of("mlp.down_proj", scheme, BF16)
    assert "CPU" in caught.value.fix
