"""Products of many rows of 8-bit codes with INT4 weights against float64, from the same codes."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: it comes with CUDA builds of torch")

from quantkit_kernels.strip_weight import prepare
from quantkit_kernels.wide_codes import wide_codes
from quantkit_kernels.wide_launch import CAPABILITY
from tests.gpu.test_w8a8 import check, random_weight, random_x
from tests.gpu.triton_device import generator, poisoned, side_by_side  # noqa: F401

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != CAPABILITY,
        reason="no GPU of compute capability 9.0",
    ),
    pytest.mark.usefixtures("poisoned"),
]
BITS = {"int8": 24, "fp8": 13}  # that a sum keeps
BF16, FP16 = torch.bfloat16, torch.float16


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("m", [1, 33, 129, 257, 1000])
@pytest.mark.parametrize(
    ("n", "k"), [(4096, 4096), (576, 1536), (33, 200), (129, 4160), (1030, 77), (5120, 1088)]
)
def test_every_shape(m, n, k, kind):
    """Whole tiles and halves, odd numbers of stages, and outputs that no copy engine takes."""
    weight, w = random_weight(n, k, "int4", tile=(1, 128), scale_dtype=BF16)
    codes, scale, _, x, _ = random_x(m, k, kind)
    operand = prepare(weight)
    y = wide_codes(codes, operand, x_scale=scale, out_dtype=BF16)
    check(y, x, w, sum_bits=BITS[kind])
    again = [wide_codes(codes, operand, x_scale=scale, out_dtype=BF16) for _ in range(3)]
    assert all(torch.equal(other, y) for other in again)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("group", [0, 32, 64, 128])
@pytest.mark.parametrize("dtype", [BF16, FP16, torch.float32])
def test_every_granularity_and_bias(dtype, group, kind):
    weight, w = random_weight(200, 392, "int4", tile=(1, group or 392))
    bias = torch.randn(200, generator=generator(7)).to(dtype).cuda()
    codes, scale, _, x, _ = random_x(300, 392, kind, is_static=group == 64)
    y = wide_codes(
        codes, prepare(weight), x_scale=scale, out_dtype=FP16 if dtype == FP16 else BF16, bias_N=bias
    )
    check(y, x, w, bias, sum_bits=BITS[kind])


@pytest.mark.parametrize("group", [0, 128])
@pytest.mark.parametrize("is_static", [False, True])
def test_zero_points_of_x(group, is_static):
    weight, w = random_weight(129, 392, "int4", tile=(1, group or 392))
    codes, scale, zero, x, magnitude = random_x(257, 392, "int8", is_static=is_static, with_zero=True)
    operand = prepare(weight, with_row_sum=True)
    y = wide_codes(codes, operand, x_scale=scale, zero_point=zero, out_dtype=BF16)
    check(y, x, w, magnitude=magnitude)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("stride", [200, 201, 208])
def test_what_lies_beyond_x_is_never_seen(kind, stride):
    weight, w = random_weight(64, 200, "int4", tile=(1, 64))
    codes, scale, _, x, _ = random_x(270, 200, kind)
    around = torch.full((272, stride + 8), 127, dtype=torch.int8, device="cuda")  # NaN in e4m3
    around[:270, :200] = codes.view(torch.int8)
    around = around.view(codes.dtype)[:270, :200]
    check(wide_codes(around, prepare(weight), x_scale=scale, out_dtype=BF16), x, w, sum_bits=BITS[kind])


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_in_a_graph_with_dependent_launch(kind):
    weight, w = random_weight(6144, 4096, "int4", tile=(1, 128))
    other, v = random_weight(4096, 4096, "int4", tile=(1, 128))
    a, b = prepare(weight), prepare(other)
    codes, scale, _, x, _ = random_x(256, 4096, kind)

    def both():
        return [wide_codes(codes, of, x_scale=scale, out_dtype=BF16, dependent=True) for of in (a, b, a, b)]

    both()
    graph = torch.cuda.CUDAGraph()
    with side_by_side(), torch.cuda.graph(graph):
        outputs = both()
    for _ in range(3):
        graph.replay()
        for y, of in zip(outputs, (w, v, w, v), strict=True):
            check(y, x, of, sum_bits=BITS[kind])


def test_more_than_2_31_outputs():
    weight, w = random_weight(65536, 64, "int4", tile=(1, 32), scale_dtype=BF16)
    found = random_x(1 << 15, 64, "int8")
    codes, scale, x = (torch.cat([found[part], found[part][:1024]]) for part in (0, 1, 3))
    y = wide_codes(codes, prepare(weight), x_scale=scale, out_dtype=BF16)
    assert y.numel() > 2**31
    check(y[-100:], x[-100:], w)
    assert torch.equal(y[: 1 << 10], y[1 << 15 :])
