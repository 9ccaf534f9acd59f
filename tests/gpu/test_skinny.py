"""Products of few rows against float64, in every format."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: it comes with CUDA builds of torch")

from quantkit_kernels.repack import from_fragments, to_fragments
from quantkit_kernels.skinny import skinny
from quantkit_kernels.strip_weight import prepare, prepare_dense
from quantkit_kernels.weight import LinearWeight
from tests.gpu.triton_device import generator, poisoned, side_by_side  # noqa: F401

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.usefixtures("poisoned"),
]
ROWS = (1, 2, 3, 4, 5, 7, 8, 16, 17, 31, 32)
SHAPES = ((64, 128), (4096, 4096), (576, 1536), (33, 200), (100, 576), (129, 4160))
BITS = {torch.int8: 8, torch.float8_e4m3fn: 8}


def random_weight(
    n, k, *, kind="int4", group=0, rows=1, asymmetric=False, scale_dtype=torch.bfloat16, seed=0
):
    draw = generator(seed)
    cols = group or k
    grid = (-(-n // rows), -(-k // cols))
    if kind == "fp8":
        codes = torch.randn(n, k, generator=draw).mul(100).clamp(-448, 448).to(torch.float8_e4m3fn)
    else:
        limit = 8 if kind == "int4" else 128
        codes = torch.randint(-limit, limit, (n, k), generator=draw, dtype=torch.int8)
    scale = (torch.rand(grid, generator=draw) + 0.1).mul(0.01).to(scale_dtype)
    zero = torch.randint(-8, 8, grid, generator=draw, dtype=torch.int8) if asymmetric else None
    weight = LinearWeight(
        codes.cuda(),
        scale.cuda(),
        None if zero is None else zero.cuda(),
        (rows, cols),
        4 if kind == "int4" else 8,
    )
    return weight, dequantized(weight)


def dequantized(weight):
    n, k = weight.codes_NK.shape
    of_row = torch.arange(n, device="cuda") // weight.tile[0]
    of_col = torch.arange(k, device="cuda") // weight.tile[1]
    w = weight.codes_NK.to(torch.float64)
    if weight.zero_point_RG is not None:
        w = w - weight.zero_point_RG.double()[of_row][:, of_col]
    return w * weight.scale_RG.double()[of_row][:, of_col]


def check(y, x, w, bias=None, *, magnitude=None):
    """One rounding of the output, and float32 sums of K products in any order."""
    expected = x.double() @ w.T + (0 if bias is None else bias.double())
    magnitude = x.double().abs() @ w.abs().T if magnitude is None else magnitude
    sums, half = 2**-22 * (x.shape[1] / 16 + 16) * magnitude, torch.finfo(y.dtype).eps / 2
    bound = half * expected.abs() + (1 + half) * sums + half * torch.finfo(y.dtype).smallest_normal
    error = (y.double() - expected).abs()
    assert torch.isfinite(y).all()
    assert (error <= bound).all(), f"{(error / bound).max():.2f} of the bound"


def random_x(m, k, dtype, seed=1):
    return torch.randn(m, k, generator=generator(seed)).to(dtype).cuda()


def test_fragments_round_trip():
    codes = torch.randint(-8, 8, (50, 200), dtype=torch.int8, device="cuda")
    assert torch.equal(from_fragments(to_fragments(codes), 50, 200), codes)


@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_int4_in_groups(m, n, k):
    weight, w = random_weight(n, k, group=128)
    x = random_x(m, k, torch.bfloat16)
    check(skinny(x, prepare(weight)), x, w)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("group", [0, 32, 64, 128])
@pytest.mark.parametrize(("n", "k"), SHAPES[1:4])
def test_int4_of_every_granularity(n, k, group, asymmetric, dtype):
    weight, w = random_weight(n, k, group=group, asymmetric=asymmetric)
    x, bias = random_x(5, k, dtype), torch.randn(n, generator=generator(3)).to(dtype).cuda()
    check(skinny(x, prepare(weight), bias_N=bias), x, w, bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize(("group", "rows"), [(0, 1), (128, 128), (64, 1), (32, 1)])
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (100, 576), (33, 200), (129, 4160), (40, 77)])
def test_8_bit_weights(n, k, group, rows, kind, dtype):
    weight, w = random_weight(n, k, kind=kind, group=group, rows=rows, scale_dtype=torch.float32)
    for m in (1, 9, 32):
        x = random_x(m, k, dtype)
        check(skinny(x, prepare(weight)), x, w)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [0, 32, 128])
def test_int8_weights_with_zero_points(group, dtype):
    weight, _ = random_weight(100, 576, kind="int8", group=group, scale_dtype=torch.float32)
    zero = torch.randint(-128, 128, weight.scale_RG.shape, generator=generator(7), dtype=torch.int8).cuda()
    weight = weight._replace(zero_point_RG=zero)
    x = random_x(5, 576, dtype)
    check(skinny(x, prepare(weight)), x, dequantized(weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (100, 576), (33, 200), (40, 77)])
def test_16_bit_weights(n, k, dtype):
    w = torch.randn(n, k, generator=generator(0)).to(dtype).cuda()
    for m in (1, 3, 16):
        x = random_x(m, k, dtype)
        check(skinny(x, prepare_dense(w)), x, w.double())


@pytest.mark.parametrize(
    ("kind", "group"), [("fp8", 0), ("fp8", 128), ("int4", 128), ("int4", 32), ("int4", 0)]
)
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (100, 576), (33, 200), (40, 77)])
def test_fp8_inputs(n, k, kind, group):
    rows = 128 if kind == "fp8" and group else 1
    weight, w = random_weight(n, k, kind=kind, group=group, rows=rows)
    for m in (1, 8, 17):
        codes = (torch.randn(m, k, generator=generator(2)) * 50).to(torch.float8_e4m3fn).cuda()
        scale = (torch.rand(m, generator=generator(4)) + 0.1).cuda()
        y = skinny(codes, prepare(weight), out_dtype=torch.bfloat16, x_scale=scale)
        check(y, codes.double() * scale[:, None], w)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("with_zero", [False, True])
@pytest.mark.parametrize(("kind", "group"), [("int8", 0), ("int4", 128), ("int4", 32), ("int4", 0)])
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (100, 576), (33, 200), (40, 77)])
def test_int8_inputs(n, k, kind, group, with_zero, static):
    weight, w = random_weight(n, k, kind=kind, group=group)
    for m in (1, 8, 17):
        codes = torch.randint(-128, 128, (m, k), generator=generator(2), dtype=torch.int8).cuda()
        scale = (torch.rand(1 if static else m, generator=generator(4)) + 0.1).cuda()
        zero = (
            torch.randint(-128, 128, scale.shape, generator=generator(5)).float().cuda()
            if with_zero
            else None
        )
        operand = prepare(weight, with_row_sum=with_zero)
        y = skinny(codes, operand, out_dtype=torch.float16, x_scale=scale * 0.01, x_zero_point=zero)
        x = (codes.double() - (0 if zero is None else zero.double().view(-1, 1))) * (
            scale * 0.01
        ).double().view(-1, 1)
        magnitude = (codes.double().abs() + 128) * (scale * 0.01).double().view(-1, 1) @ w.abs().T
        check(y, x, w, magnitude=magnitude)


def test_what_lies_beyond_x_is_never_seen():
    weight, w = random_weight(64, 200, group=64)
    for stride in (200, 201, 208):
        around = torch.full((9, stride + 8), float("nan"), dtype=torch.bfloat16, device="cuda")
        x = around[:7, :200]
        x.copy_(random_x(7, 200, torch.bfloat16))
        check(skinny(x, prepare(weight)), x, w)


def test_runs_are_identical():
    weight, _ = random_weight(4096, 4096, group=128)
    operand, x = prepare(weight), random_x(16, 4096, torch.bfloat16)
    first = skinny(x, operand)
    assert all(torch.equal(skinny(x, operand), first) for _ in range(20))


def test_rows_do_not_depend_on_the_batch():
    weight, _ = random_weight(4096, 4096, group=128)
    operand, x = prepare(weight), random_x(32, 4096, torch.bfloat16)
    together = skinny(x, operand)
    assert torch.equal(skinny(x[3:4], operand), together[3:4])


def test_in_a_graph_with_dependent_launch():
    first, w1 = random_weight(4096, 4096, group=128)
    second, w2 = random_weight(4096, 4096, group=128, seed=9)
    a, b, x = prepare(first), prepare(second), random_x(4, 4096, torch.bfloat16)
    for operand in (a, b):
        skinny(x, operand)
    graph = torch.cuda.CUDAGraph()
    with side_by_side(), torch.cuda.graph(graph):
        middle = skinny(x, a, dependent=True)
        y = skinny(middle, b, dependent=True)
    for seed in range(5):
        x.copy_(random_x(4, 4096, torch.bfloat16, seed))
        graph.replay()
        check(middle, x, w1)
        check(y, middle, w2)
