"""Every scheme that can be stored has a kernel on a GPU, and all are called alike: checked with what CPUs compute."""

import itertools

import pytest
import torch

from quantkit.errors import SchemeError
from quantkit.formats.compressed_tensors import StoredLinear
from quantkit.runtime.layers.linear_part import as_linear_weight
from quantkit.schemes import (
    FloatSpec,
    IntSpec,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QParams,
    Scheme,
)
from quantkit.schemes.support import check_scheme
from quantkit.schemes.tiles import dequantize_weight, scale_shape
from quantkit_kernels.catalog import UnsupportedError, find_gpu, format_of
from quantkit_kernels.product import multiply, prepare
from quantkit_kernels.row_codes import Codes, quantize_rows

pytest.importorskip("triton", reason="triton is not installed: the families ask for it")

HOPPER = (9, 0)
DEVICES = [(8, 0), (8, 9), HOPPER, (10, 0), (12, 0)]
GRANULARITIES = (PerTensor(), PerChannel(), PerGroup(32), PerGroup(64), PerGroup(128), PerBlock(128, 128))
WEIGHTS = [FloatSpec(granularity=granularity) for granularity in GRANULARITIES] + [
    IntSpec(bits=bits, granularity=granularity, symmetric=symmetric)
    for bits, granularity, symmetric in itertools.product((2, 4, 8), GRANULARITIES, (True, False))
]
INPUTS = [None] + [
    spec
    for granularity in (PerToken(), PerTensor(), PerGroup(128))
    for spec in (
        FloatSpec(granularity=granularity),
        IntSpec(bits=8, granularity=granularity),
        IntSpec(bits=8, granularity=granularity, symmetric=False),
    )
]


def can_be_stored(scheme):
    try:
        check_scheme(scheme)
    except SchemeError:
        return False
    return True


SCHEMES = [Scheme(weight=w, activation=x) for w in WEIGHTS for x in INPUTS]
SCHEMES = [scheme for scheme in SCHEMES if can_be_stored(scheme)]


def words(scheme):
    def spec(of):
        kind = "fp8" if isinstance(of, FloatSpec) else f"int{of.bits}"
        return f"{kind}-{of.granularity}{'' if of.symmetric else '-zero'}"

    return spec(scheme.weight) + (f" x {spec(scheme.activation)}" if scheme.activation else "")


def random_codes(spec, shape, draw):
    if isinstance(spec, FloatSpec):
        return (torch.randn(shape, generator=draw) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    return torch.randint(spec.qmin, spec.qmax + 1, shape, generator=draw, dtype=torch.int8)


def stored_linear(scheme, num_rows, num_cols):
    draw, spec = torch.Generator().manual_seed(0), scheme.weight
    shape = scale_shape(spec.granularity, num_rows, num_cols)
    scale = (torch.rand(shape, generator=draw) * 0.01 + 0.001).bfloat16()
    zero = None if spec.symmetric else random_codes(spec, shape, draw)
    static = None
    if scheme.is_static:
        zero_of_input = None if scheme.activation.symmetric else torch.tensor([-17], dtype=torch.int8)
        static = QParams(torch.tensor([0.0234375]).bfloat16(), zero_of_input)
    return StoredLinear(random_codes(spec, (num_rows, num_cols), draw), QParams(scale, zero), static)


def input_of(scheme, dtype):
    """The dtype of what is multiplied."""
    if scheme.activation is None:
        return dtype
    return torch.float8_e4m3fn if isinstance(scheme.activation, FloatSpec) else torch.int8


def encoded(x_MK, scheme, static):
    """What a layer gives `multiply`: x or its codes, what goes with them; and the value of it in float64."""
    if scheme.activation is None:
        return x_MK, {}, x_MK.double()
    group = 128 if isinstance(scheme.activation.granularity, PerGroup) else 0
    scale, zero = (None, None) if static is None else static
    codes = Codes(input_of(scheme, x_MK.dtype), group, None if scale is None else scale.float(), zero)
    codes_MK, scale_MG = quantize_rows(x_MK, *codes)
    more = {"x_scale": scale_MG, "x_zero_point": zero, "out_dtype": x_MK.dtype}
    if zero is not None:
        more["x_zero_point"] = zero.expand(len(x_MK), 1)
    offset = 0 if zero is None else zero.double()
    exact = (codes_MK.double() - offset) * scale_MG.double().repeat_interleave(group or x_MK.shape[1], dim=1)
    return codes_MK, more, exact


def test_schemes_of_every_kind_are_among_them():
    assert len(SCHEMES) > 30
    assert {scheme.weight.bits for scheme in SCHEMES} == {2, 4, 8}


@pytest.mark.parametrize("scheme", SCHEMES, ids=words)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_stored_is_multiplied(scheme, dtype):
    """N and K are odd where the format lets them."""
    in_groups = isinstance(scheme.weight.granularity, PerGroup | PerBlock)
    num_rows, num_cols = 133, 384 if in_groups else 77
    stored = stored_linear(scheme, num_rows, num_cols)
    weight = as_linear_weight(stored, scheme.weight)
    draw = torch.Generator().manual_seed(1)
    x_MK, bias_N = (
        torch.randn(5, num_cols, generator=draw).to(dtype),
        torch.randn(num_rows, generator=draw).to(dtype),
    )
    w = dequantize_weight(stored.codes_NK, scheme.weight.granularity, stored.qparams).double()
    x, more, exact = encoded(x_MK, scheme, stored.input_qparams)
    half = torch.finfo(dtype).eps / 2
    for bias in (None, bias_N):
        prepared = prepare(weight, input_of(scheme, dtype), HOPPER, batch_invariant=bias is None)
        y = multiply(x, prepared, bias_N=bias, **more)
        expected = exact @ w.T + (0 if bias is None else bias.double())
        magnitude = exact.abs() @ w.abs().T + (
            128 * 0.0234375 * w.abs().sum(dim=1) if scheme.is_static else 0
        )
        bound = half * expected.abs() + (half + 2**-20) * magnitude
        assert y.dtype == dtype
        assert ((y.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("capability", DEVICES)
@pytest.mark.parametrize("scheme", SCHEMES, ids=words)
def test_every_device_has_a_kernel_or_one_for_inputs_in_16_bits(scheme, capability):
    stored = stored_linear(scheme, 32, 128)
    weight = format_of(as_linear_weight(stored, scheme.weight))
    try:
        find_gpu(weight, input_of(scheme, torch.bfloat16), capability)
    except UnsupportedError as error:
        assert capability < (8, 9) and input_of(scheme, torch.bfloat16) == torch.float8_e4m3fn
        assert find_gpu(weight, torch.bfloat16, capability)[0].name == error.nearest


def test_weights_in_16_bits_are_multiplied_alike():
    w, x = torch.randn(33, 77).bfloat16(), torch.randn(3, 77).bfloat16()
    assert torch.equal(multiply(x, prepare(w, x.dtype, HOPPER)), torch.nn.functional.linear(x, w))
