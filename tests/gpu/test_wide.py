"""Products of hundreds to thousands of rows with weights of 4 and 8 bits against float64."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: it comes with CUDA builds of torch")

from quantkit_kernels.strip_weight import prepare
from quantkit_kernels.wide import KINDS, wide
from quantkit_kernels.wide_launch import CAPABILITY, shares, tiles_of
from tests.gpu.test_skinny import random_weight, random_x
from tests.gpu.test_tile import as_multiplied, check
from tests.gpu.triton_device import generator, poisoned, side_by_side  # noqa: F401

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != CAPABILITY,
        reason="no GPU of compute capability 9.0",
    ),
    pytest.mark.usefixtures("poisoned"),
]
ROWS = (1, 33, 129, 257, 512, 1000)
SHAPES = ((64, 128), (4096, 4096), (576, 1536), (33, 200), (100, 576), (129, 4160), (1030, 77))
TILINGS = [kind.tiling for kind in KINDS]
WHOLE_AND_HALF = {
    256: (512, 11520),
    128: (512, 5120),
}  # rows of x and of w that give 132 multiprocessors both


@pytest.mark.parametrize(
    ("m", "n", "k"), [(m, n, k) for m in ROWS for n, k in SHAPES] + [(4096, 4096, 4096), (4096, 129, 4160)]
)
def test_symmetric_in_groups(m, n, k):
    weight, _ = random_weight(n, k, group=128)
    x = random_x(m, k, torch.bfloat16)
    check(wide(x, prepare(weight)), x, as_multiplied(weight, x.dtype))


@pytest.mark.parametrize("tiling", TILINGS)
def test_every_tiling(tiling):
    """Whole tiles, several to a multiprocessor; halves alone, and after whole ones; an odd number of stages."""
    shapes = [(600, 9000), (300, 4000), (2100, 5000), WHOLE_AND_HALF[tiling.m_tile]]
    for (m, n), (k, group, asymmetric) in zip(
        shapes, [(1088, 128, False), (2112, 32, True)] * 2, strict=True
    ):
        weight, _ = random_weight(n, k, group=group, asymmetric=asymmetric)
        x, operand = random_x(m, k, torch.bfloat16), prepare(weight)
        first = wide(x, operand, tiling=tiling)
        check(first, x, as_multiplied(weight, x.dtype))
        assert all(torch.equal(wide(x, operand, tiling=tiling), first) for _ in range(5))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("k", [64, 200, 1536])
def test_halves_of_8_bit_weights(k, kind):
    weight, _ = random_weight(4000, k, kind=kind)
    x, operand = random_x(300, k, torch.bfloat16), prepare(weight)
    for tiling in TILINGS:
        check(wide(x, operand, tiling=tiling), x, as_multiplied(weight, x.dtype))


def test_those_shapes_have_whole_tiles_and_halves():
    for tiling in TILINGS:
        m_tiles, w_tiles = tiles_of(tiling, *WHOLE_AND_HALF[tiling.m_tile])
        whole, halves = shares(m_tiles * w_tiles, tiling, 132)
        assert whole and (halves or tiling.warpgroups == 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("group", [0, 32, 64, 128])
@pytest.mark.parametrize(("n", "k"), SHAPES[1:5])
def test_every_granularity(n, k, group, asymmetric, dtype):
    weight, _ = random_weight(n, k, group=group, asymmetric=asymmetric)
    x, bias = random_x(300, k, dtype), torch.randn(n, generator=generator(3)).to(dtype).cuda()
    check(wide(x, prepare(weight), bias_N=bias), x, as_multiplied(weight, dtype), bias)


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_of_every_dtype(dtype, scale_dtype):
    weight, _ = random_weight(576, 1536, group=32, asymmetric=True, scale_dtype=scale_dtype)
    x = random_x(333, 1536, dtype)
    check(wide(x, prepare(weight)), x, as_multiplied(weight, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize(("group", "rows"), [(0, 1), (128, 128), (64, 1), (32, 1)])
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (100, 576), (33, 200), (129, 4160), (40, 77)])
def test_8_bit_weights(n, k, group, rows, kind, dtype):
    weight, _ = random_weight(n, k, kind=kind, group=group, rows=rows, scale_dtype=torch.float32)
    x = random_x(329, k, dtype)
    check(wide(x, prepare(weight)), x, as_multiplied(weight, dtype))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_8_bit_weights_by_thousands_of_rows(kind):
    weight, _ = random_weight(1030, 4096, kind=kind)
    x = random_x(4096, 4096, torch.bfloat16)
    check(wide(x, prepare(weight)), x, as_multiplied(weight, x.dtype))


def test_8_bit_weights_with_zero_points():
    weight, _ = random_weight(576, 1536, kind="int8", group=64, asymmetric=True)
    x = random_x(333, 1536, torch.bfloat16)
    check(wide(x, prepare(weight)), x, as_multiplied(weight, x.dtype))


def test_what_lies_beyond_x_is_never_seen():
    weight, _ = random_weight(64, 200, group=64)
    for stride in (200, 201, 208):
        around = torch.full((300, stride + 8), float("nan"), dtype=torch.bfloat16, device="cuda")
        x = around[:270, :200]
        x.copy_(random_x(270, 200, torch.bfloat16))
        check(wide(x, prepare(weight)), x, as_multiplied(weight, x.dtype))
        check(wide(x[1:], prepare(weight)), x[1:], as_multiplied(weight, x.dtype))


def test_in_a_graph_with_dependent_launch():
    first, _ = random_weight(4096, 4096, group=128)
    second, _ = random_weight(4096, 4096, group=128, seed=9)
    a, b, x = prepare(first), prepare(second), random_x(512, 4096, torch.bfloat16)
    for operand in (a, b):
        wide(x, operand)
    graph = torch.cuda.CUDAGraph()
    with side_by_side(), torch.cuda.graph(graph):
        middle = wide(x, a, dependent=True)
        y = wide(middle, b, dependent=True)
    for seed in range(5):
        x.copy_(random_x(512, 4096, torch.bfloat16, seed))
        graph.replay()
        check(middle, x, as_multiplied(first, x.dtype))
        check(y, middle, as_multiplied(second, x.dtype))


def test_more_than_2_31_outputs():
    weight, _ = random_weight(65536, 64, group=32)
    x = random_x(1 << 15, 64, torch.bfloat16).repeat(2, 1)[: 33 * 1024]
    y = wide(x, prepare(weight))
    assert y.numel() > 2**31
    check(y[-100:], x[-100:], as_multiplied(weight, x.dtype))
    assert torch.equal(y[: 1 << 10], y[1 << 15 :])
