"""Products of tens to hundreds of rows with weights of 4 and 8 bits against float64."""

import math

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: it comes with CUDA builds of torch")

from quantkit_kernels.strip_weight import prepare
from quantkit_kernels.tile import CAPABILITY, Tiling, tile
from tests.gpu.test_skinny import dequantized, random_weight, random_x
from tests.gpu.triton_device import generator, poisoned, side_by_side  # noqa: F401

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != CAPABILITY,
        reason="no GPU of compute capability 9.0",
    ),
    pytest.mark.usefixtures("poisoned"),
]
ROWS = (1, 17, 31, 33, 64, 65, 96, 128, 129, 257, 1000)
SHAPES = ((64, 128), (4096, 4096), (576, 1536), (33, 200), (100, 576), (129, 4160), (1030, 77))
TILINGS = (
    Tiling(32, 2, 1),
    Tiling(32, 1, 4, 2),
    Tiling(64, 2, 6),
    Tiling(64, 1, 3, 2),
    Tiling(96, 1, 5, 2, 2),
    Tiling(128, 2, 2),
    Tiling(128, 1, 7),
    Tiling(192, 1, 2),
    Tiling(256, 1, 1),
    Tiling(256, 1, 8, x_stages=2),
)


def as_multiplied(weight, dtype):
    """The weights in float64 that the tensor cores see: rounded once in groups, exact with a scale per row."""
    w = dequantized(weight)
    if weight.zero_point_RG is None and weight.tile[1] >= weight.codes_NK.shape[1]:
        return w
    return w.float().to(dtype).double()


def check(y, x, w, bias=None):
    """One rounding of the output, and float32 sums of K products in any order."""
    expected = x.double() @ w.T + (0 if bias is None else bias.double())
    sums, half = (
        2**-22 * (x.shape[1] / 16 + 16) * (x.double().abs() @ w.abs().T),
        torch.finfo(y.dtype).eps / 2,
    )
    bound = half * expected.abs() + (1 + half) * sums + half * torch.finfo(y.dtype).smallest_normal
    error = (y.double() - expected).abs()
    assert torch.isfinite(y).all(), f"{(~torch.isfinite(y)).sum()} of {y.numel()} are not finite"
    share = (error > bound).double().mean()
    assert share == 0, f"{(error / bound).max():.2f} of the bound, {share:.3f} of y beyond it"


@pytest.mark.parametrize(
    ("m", "n", "k"), [(m, n, k) for m in ROWS for n, k in SHAPES] + [(4096, 4096, 4096), (4096, 129, 4160)]
)
def test_symmetric_in_groups(m, n, k):
    weight, _ = random_weight(n, k, group=128)
    x = random_x(m, k, torch.bfloat16)
    check(tile(x, prepare(weight)), x, as_multiplied(weight, x.dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("group", [0, 32, 64, 128])
@pytest.mark.parametrize(("n", "k"), SHAPES[1:5])
def test_every_granularity(n, k, group, asymmetric, dtype):
    weight, _ = random_weight(n, k, group=group, asymmetric=asymmetric)
    x, bias = random_x(50, k, dtype), torch.randn(n, generator=generator(3)).to(dtype).cuda()
    check(tile(x, prepare(weight), bias_N=bias), x, as_multiplied(weight, dtype), bias)


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_scales_of_every_dtype(kind, dtype, scale_dtype, asymmetric):
    asymmetric &= kind != "fp8"
    weight, _ = random_weight(576, 1536, kind=kind, group=32, asymmetric=asymmetric, scale_dtype=scale_dtype)
    x = random_x(33, 1536, dtype)
    check(tile(x, prepare(weight)), x, as_multiplied(weight, dtype))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 2.0**100), (torch.float16, 2.0**16)])
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("size", [2.0**-24, 255, 256, 500, 2.0**20])
def test_scales_of_every_size(size, kind, scale_dtype, dtype, limit):
    """As long as weights are numbers of the dtype of x, which holds them; x is as small as they are large."""
    weight, _ = random_weight(576, 320, kind=kind, group=64, scale_dtype=torch.float32)
    weight = weight._replace(scale_RG=(weight.scale_RG * (size / 0.011)).to(scale_dtype))
    if dequantized(weight).abs().max() >= limit:
        pytest.skip("a weight is infinite")
    x = random_x(33, 320, dtype) * 2.0 ** min(9, -round(math.log2(size)))
    check(tile(x, prepare(weight)), x, as_multiplied(weight, dtype))


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_are_those_of_the_formula(dtype, scale_dtype):
    """No farther from them than one rounding of each weight, and of the output."""
    weight, w = random_weight(576, 1536, group=128, scale_dtype=scale_dtype)
    x = random_x(65, 1536, dtype)
    y, expected, magnitude = tile(x, prepare(weight)), x.double() @ w.T, x.double().abs() @ w.abs().T
    half = torch.finfo(dtype).eps / 2
    sums = 2**-22 * (1536 / 16 + 16) * magnitude
    # roundings of weights have either sign: of K of them, eight times what they come to by chance
    weights = half * 8 * (x.double().square() @ w.square().T).sqrt()
    assert ((y.double() - expected).abs() <= half * expected.abs() + (1 + half) * (weights + sums)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize(("group", "rows"), [(0, 1), (128, 128), (64, 1), (32, 1)])
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (100, 576), (33, 200), (129, 4160), (40, 77)])
def test_8_bit_weights(n, k, group, rows, kind, dtype):
    weight, _ = random_weight(n, k, kind=kind, group=group, rows=rows, scale_dtype=torch.float32)
    for m in (50, 129):
        x = random_x(m, k, dtype)
        check(tile(x, prepare(weight)), x, as_multiplied(weight, dtype))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_8_bit_weights_by_thousands_of_rows(kind):
    weight, _ = random_weight(1030, 4096, kind=kind)
    x = random_x(4096, 4096, torch.bfloat16)
    check(tile(x, prepare(weight)), x, as_multiplied(weight, x.dtype))


def test_8_bit_weights_with_zero_points():
    weight, _ = random_weight(576, 1536, kind="int8", group=64, asymmetric=True)
    x = random_x(33, 1536, torch.bfloat16)
    check(tile(x, prepare(weight)), x, as_multiplied(weight, x.dtype))


@pytest.mark.parametrize(("asymmetric", "scale_dtype"), [(True, torch.bfloat16), (False, torch.float32)])
@pytest.mark.parametrize("m", [256, 1000])
def test_8_bit_weights_in_the_smallest_groups(m, asymmetric, scale_dtype):
    """Whose ring has no room beside as many rows of x as those of others."""
    weight, _ = random_weight(
        576, 1536, kind="int8", group=32, asymmetric=asymmetric, scale_dtype=scale_dtype
    )
    x = random_x(m, 1536, torch.bfloat16)
    check(tile(x, prepare(weight)), x, as_multiplied(weight, x.dtype))


@pytest.mark.parametrize("tiling", TILINGS)
def test_every_tiling(tiling):
    for group, asymmetric in ((128, False), (32, True)):
        weight, _ = random_weight(1030, 2112, group=group, asymmetric=asymmetric)
        x = random_x(300, 2112, torch.bfloat16)
        operand = prepare(weight)
        first = tile(x, operand, tiling=tiling)
        check(first, x, as_multiplied(weight, x.dtype))
        assert all(torch.equal(tile(x, operand, tiling=tiling), first) for _ in range(5))


def test_what_lies_beyond_x_is_never_seen():
    weight, _ = random_weight(64, 200, group=64)
    for stride in (200, 201, 208):
        around = torch.full((40, stride + 8), float("nan"), dtype=torch.bfloat16, device="cuda")
        x = around[:37, :200]
        x.copy_(random_x(37, 200, torch.bfloat16))
        check(tile(x, prepare(weight)), x, as_multiplied(weight, x.dtype))


def test_in_a_graph_with_dependent_launch():
    first, _ = random_weight(4096, 4096, group=128)
    second, _ = random_weight(4096, 4096, group=128, seed=9)
    a, b, x = prepare(first), prepare(second), random_x(64, 4096, torch.bfloat16)
    for operand in (a, b):
        tile(x, operand)
    graph = torch.cuda.CUDAGraph()
    with side_by_side(), torch.cuda.graph(graph):
        middle = tile(x, a, dependent=True)
        y = tile(middle, b, dependent=True)
    for seed in range(5):
        x.copy_(random_x(64, 4096, torch.bfloat16, seed))
        graph.replay()
        check(middle, x, as_multiplied(first, x.dtype))
        check(y, middle, as_multiplied(second, x.dtype))


def test_more_than_2_31_outputs():
    weight, _ = random_weight(65536, 64, group=32)
    x = random_x(1 << 15, 64, torch.bfloat16).repeat(2, 1)[: 33 * 1024]
    y = tile(x, prepare(weight))
    assert y.numel() > 2**31
    check(y[-100:], x[-100:], as_multiplied(weight, x.dtype))
    assert torch.equal(y[: 1 << 10], y[1 << 15 :])
