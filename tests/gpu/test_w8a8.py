"""Products with quantized activations against float64, from the same codes."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: it comes with CUDA builds of torch")

from quantkit_kernels import byte_tile_kernel, strip_weight, w4a8, w8a8_fp8, w8a8_int8
from quantkit_kernels.weight import LinearWeight
from tests.gpu.triton_device import generator, poisoned, side_by_side  # noqa: F401

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.usefixtures("poisoned"),
]
ROWS = (1, 2, 3, 4, 5, 7, 8, 16, 17, 31, 33, 64, 65, 128, 129, 257, 1000, 4096)
FEW_ROWS = (33, 257)
SHAPES = ((256, 512), (33, 200), (129, 4160), (40, 77))
BF16, FP16 = torch.bfloat16, torch.float16


def random_codes(rows, cols, kind, seed):
    if kind == "fp8":
        return (
            torch.randn(rows, cols, generator=generator(seed))
            .mul(100)
            .clamp(-448, 448)
            .to(torch.float8_e4m3fn)
        )
    limit = 8 if kind == "int4" else 128
    return torch.randint(-limit, limit, (rows, cols), generator=generator(seed), dtype=torch.int8)


def random_weight(n, k, kind, *, tile=None, asymmetric=False, scale_dtype=torch.float32):
    """A weight on the device, and float64 [N, K] of it."""
    rows, cols = tile or (1, k)
    grid = (-(-n // rows), -(-k // cols))
    scale = (torch.rand(grid, generator=generator(1)) + 0.1).mul(0.01).to(scale_dtype)
    zero = torch.randint(-8, 8, grid, generator=generator(2), dtype=torch.int8) if asymmetric else None
    codes = random_codes(n, k, kind, 3)
    weight = LinearWeight(
        codes.cuda(),
        scale.cuda(),
        None if zero is None else zero.cuda(),
        (rows, cols),
        4 if kind == "int4" else 8,
    )
    by_weight = torch.arange(n)[:, None] // rows, torch.arange(k)[None, :] // cols
    w = codes.double() - (0 if zero is None else zero.double()[by_weight])
    return weight, (w * scale.double()[by_weight]).cuda()


def random_x(m, k, kind, *, is_static=False, with_zero=False):
    """Codes, scale and zero point of x; float64 [M, K] of it, and of |x| and |zero point| together."""
    codes = random_codes(m, k, kind, 4).cuda()
    scale = (torch.rand((1,) if is_static else (m, 1), generator=generator(5)) + 0.1).cuda()
    zero = None
    if with_zero:
        zero = torch.randint(-128, 128, scale.shape, generator=generator(6), dtype=torch.int8).cuda()
    offset = torch.zeros_like(scale) if zero is None else zero
    x = (codes.double() - offset.double()) * scale.double()
    return codes, scale, zero, x, (codes.double().abs() + offset.double().abs()) * scale.double()


def check(y, x, w, bias=None, *, sum_bits=24, magnitude=None):
    """One rounding of the output, three of scales, and sums kept to `sum_bits` bits of their largest."""
    magnitude = (x.abs() if magnitude is None else magnitude) @ w.abs().T
    expected = x @ w.T + (0 if bias is None else bias.double())
    sums, half = (2.0**-21 + 2.0 ** (3 - sum_bits)) * magnitude, torch.finfo(y.dtype).eps / 2
    bound = half * expected.abs() + (1 + half) * sums
    error = (y.double() - expected).abs()
    assert torch.isfinite(y).all()
    assert (error <= bound).all(), f"{(error / bound).max():.2f} of the bound"


@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize(("n", "k"), [*SHAPES[1:], (4096, 4096)])
def test_int8_of_every_number_of_rows(m, n, k):
    weight, w = random_weight(n, k, "int8")
    codes, scale, zero, x, magnitude = random_x(m, k, "int8", with_zero=True)
    y = w8a8_int8.multiply(codes, scale, zero, w8a8_int8.prepare(weight), None, BF16)
    check(y, x, w, magnitude=magnitude)


OPTIONS = [(BF16, False, True, True), (FP16, True, True, False), (torch.float32, False, False, True)]


@pytest.mark.parametrize(("dtype", "is_static", "with_zero", "with_bias"), OPTIONS)
def test_int8_options(dtype, is_static, with_zero, with_bias):
    weight, w = random_weight(200, 392, "int8", tile=(100, 392))
    operand = w8a8_int8.prepare(weight)
    bias = torch.randn(200, generator=generator(7)).to(dtype).cuda() if with_bias else None
    for m in (1, *FEW_ROWS):
        codes, scale, zero, x, magnitude = random_x(m, 392, "int8", is_static=is_static, with_zero=with_zero)
        y = w8a8_int8.multiply(codes, scale, zero, operand, bias, dtype)
        check(y, x, w, bias, magnitude=magnitude)


def test_int8_sums_are_exact():
    """The largest codes over as many columns as the format takes."""
    n, k = 64, (1 << 16) - 16
    codes = torch.full((n, k), -128, dtype=torch.int8, device="cuda")
    weight = LinearWeight(codes, torch.ones(n, 1, device="cuda"), None, (1, k), 8)
    x = torch.full((33, k), 127, dtype=torch.int8, device="cuda")
    one, zero = torch.ones(1, device="cuda"), torch.full((1,), -128, dtype=torch.int8, device="cuda")
    y = w8a8_int8.multiply(x, one, zero, w8a8_int8.prepare(weight), None, torch.float32)
    assert torch.equal(y, torch.full_like(y, -128 * 255 * k))


@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize(("n", "k"), [*SHAPES[1:], (4096, 4096)])
@pytest.mark.parametrize("block", [False, True])
def test_fp8_of_every_number_of_rows(m, n, k, block):
    weight, w = random_weight(n, k, "fp8", tile=(128, 128) if block else None)
    operand = w8a8_fp8.prepare(weight)
    codes, scale, _, x, _ = random_x(m, k, "fp8")
    if block:
        scale = (torch.rand(m, -(-k // 128), generator=generator(8)) + 0.1).cuda()
        x = codes.double() * scale.double().repeat_interleave(128, dim=1)[:, :k]
    check(w8a8_fp8.multiply(codes, scale, operand, None, BF16), x, w, sum_bits=13)


@pytest.mark.parametrize("m", [1, 65, 129, 257, 1000])
@pytest.mark.parametrize(("n", "k"), [(384, 512), (256, 1536), (200, 640), (128, 128)])
def test_fp8_blocks_by_every_route(m, n, k):
    weight, w = random_weight(n, k, "fp8", tile=(128, 128))
    codes = random_codes(m, k, "fp8", 4).cuda()
    scale = (torch.rand(m, -(-k // 128), generator=generator(8)) + 0.1).cuda()
    x = codes.double() * scale.double().repeat_interleave(128, dim=1)[:, :k]
    bias = torch.randn(n, generator=generator(7)).to(BF16).cuda()
    check(w8a8_fp8.multiply(codes, scale, w8a8_fp8.prepare(weight), bias, BF16), x, w, bias, sum_bits=13)


@pytest.mark.parametrize(("dtype", "is_static", "_", "with_bias"), OPTIONS)
def test_fp8_options(dtype, is_static, _, with_bias):
    weight, w = random_weight(200, 392, "fp8", tile=(100, 392))
    operand = w8a8_fp8.prepare(weight)
    bias = torch.randn(200, generator=generator(7)).to(dtype).cuda() if with_bias else None
    for m in (1, *FEW_ROWS):
        codes, scale, _, x, _ = random_x(m, 392, "fp8", is_static=is_static)
        check(w8a8_fp8.multiply(codes, scale, operand, bias, dtype), x, w, bias, sum_bits=13)


@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("group", [0, 128])
def test_int4_of_every_number_of_rows(m, kind, group):
    weight, w = random_weight(4096, 4096, "int4", tile=(1, group or 4096))
    codes, scale, _, x, _ = random_x(m, 4096, kind)
    y = w4a8.multiply(codes, scale, None, strip_weight.prepare(weight), None, BF16)
    check(y, x, w, sum_bits=24 if kind == "int8" else 13)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("group", [0, 32, 64, 128])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_int4_of_every_granularity(n, k, group, asymmetric, kind):
    weight, w = random_weight(n, k, "int4", tile=(1, group or k), asymmetric=asymmetric, scale_dtype=BF16)
    operand, bias = strip_weight.prepare(weight), torch.randn(n, generator=generator(7)).to(FP16).cuda()
    for m in FEW_ROWS:
        codes, scale, _, x, _ = random_x(m, k, kind)
        y = w4a8.multiply(codes, scale, None, operand, bias, FP16)
        check(y, x, w, bias, sum_bits=24 if kind == "int8" else 13)


@pytest.mark.parametrize("group", [0, 32, 128])
@pytest.mark.parametrize("is_static", [False, True])
def test_int4_with_zero_points_of_x(group, is_static):
    weight, w = random_weight(129, 392, "int4", tile=(1, group or 392))
    operand = strip_weight.prepare(weight, with_row_sum=True)
    for m in FEW_ROWS:
        codes, scale, zero, x, magnitude = random_x(m, 392, "int8", is_static=is_static, with_zero=True)
        check(w4a8.multiply(codes, scale, zero, operand, None, BF16), x, w, magnitude=magnitude)


@pytest.mark.parametrize("kind", ["int8", "fp8", "int4"])
@pytest.mark.parametrize("stride", [200, 201, 208])
def test_what_lies_beyond_x_is_never_seen(kind, stride):
    weight, w = random_weight(64, 200, kind)
    for m in FEW_ROWS:
        x_kind = "fp8" if kind == "fp8" else "int8"
        codes, scale, _, x, _ = random_x(m, 200, x_kind)
        around = torch.full((m + 2, stride + 8), 127, dtype=torch.int8, device="cuda")  # NaN in e4m3
        around[:m, :200] = codes.view(torch.int8)
        around = around.view(codes.dtype)[:m, :200]
        if kind == "int4":
            y = w4a8.multiply(around, scale, None, strip_weight.prepare(weight), None, BF16)
        elif kind == "int8":
            y = w8a8_int8.multiply(around, scale, None, w8a8_int8.prepare(weight), None, BF16)
        else:
            y = w8a8_fp8.multiply(around, scale, w8a8_fp8.prepare(weight), None, BF16)
        check(y, x, w, sum_bits=13)


@pytest.mark.parametrize("programs", [0, 7, 132, 264, 1000])
@pytest.mark.parametrize(("maps", "x_left"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_cut_tiles_add_up_in_order(kind, maps, programs, x_left):
    m, n, k = 100, 520, 4160
    weight, w = random_weight(n, k, kind)
    codes, scale, _, x, _ = random_x(m, k, kind)
    shape = byte_tile_kernel.Shape(32 if x_left else 64, 64, 128, 4, 4, maps, x_left, programs)
    results = []
    for _ in range(10):
        y = torch.full((m, n), torch.nan, dtype=BF16, device="cuda")
        byte_tile_kernel.multiply(codes, scale, weight.codes_NK, weight.scale_RG[:, 0], y, shape)
        results.append(y)
    check(results[0], x, w, sum_bits=13)
    assert all(torch.equal(y, results[0]) for y in results)


def test_a_weight_beyond_two_billion_codes():
    n, k = 131072 + 64, 16384
    codes = torch.zeros(n, k, dtype=torch.int8, device="cuda")
    codes[-64:] = random_codes(64, k, "int8", 3).cuda()
    operand = w8a8_int8.Int8Weight(
        codes,
        torch.ones(n, device="cuda"),
        torch.zeros(n, dtype=torch.int32, device="cuda"),
        torch.zeros(n, device="cuda"),
    )
    x, scale, _, _, _ = random_x(33, k, "int8")
    y = w8a8_int8.multiply(x, scale, None, operand, None, torch.float32)
    expected = (x.double() @ codes[-64:].double().T) * scale.double()
    assert (
        torch.equal(y[:, -64:], expected.float())
        or (y[:, -64:] - expected).abs().max() <= expected.abs().max() * 2**-22
    )
    assert not y[:, :-64].any()


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_more_than_2_31_outputs_of_int4(kind):
    weight, w = random_weight(65536, 64, "int4", tile=(1, 32), scale_dtype=BF16)
    codes, scale, _, x, _ = random_x(1 << 15, 64, kind)
    scale, x = (torch.cat([each, each[:1024]]) for each in (scale, x))
    codes = torch.cat([codes.view(torch.int8), codes[:1024].view(torch.int8)]).view(codes.dtype)
    y = w4a8._tile(codes, strip_weight.prepare(weight), x_scale=scale, out_dtype=BF16)
    assert y.numel() > 2**31
    check(y[-100:], x[-100:], w, sum_bits=24 if kind == "int8" else 13)
    assert torch.equal(y[: 1 << 10], y[1 << 15 :])


@pytest.mark.parametrize("kind", ["int8", "fp8", "int4"])
def test_in_a_graph(kind):
    weight, w = random_weight(512, 512, kind)
    for m in (17, 200):
        codes, scale, _, x, _ = random_x(m, 512, "fp8" if kind == "fp8" else "int8")
        if kind == "int4":
            operand = strip_weight.prepare(weight)
            run = lambda c=codes, s=scale, o=operand: w4a8.multiply(c, s, None, o, None, BF16)  # noqa: E731
        elif kind == "int8":
            operand = w8a8_int8.prepare(weight)
            run = lambda c=codes, s=scale, o=operand: w8a8_int8.multiply(c, s, None, o, None, BF16)  # noqa: E731
        else:
            operand = w8a8_fp8.prepare(weight)
            run = lambda c=codes, s=scale, o=operand: w8a8_fp8.multiply(c, s, o, None, BF16)  # noqa: E731
        run()
        graph = torch.cuda.CUDAGraph()
        with side_by_side(), torch.cuda.graph(graph):
            y = run()
        graph.replay()
        check(y, x, w, sum_bits=13)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_the_second_graph_that_is_captured_may_run_first(kind):
    """Its tiles are cut: tickets that only the first graph set to zero would hold anything."""
    m, n, k = 100, 520, 4160
    weight, w = random_weight(n, k, kind)
    codes, scale, _, x, _ = random_x(m, k, kind)
    shape = byte_tile_kernel.Shape(64, 64, 128, 4, 4, False, False, 7)

    def run():
        y = torch.full((m, n), torch.nan, dtype=BF16, device="cuda")
        byte_tile_kernel.multiply(codes, scale, weight.codes_NK, weight.scale_RG[:, 0], y, shape)
        return y

    run()
    torch.full(
        (256 << 20,), -1, dtype=torch.int32, device="cuda"
    )  # what graphs find in memory that nobody wrote
    graphs, results, pool = [torch.cuda.CUDAGraph() for _ in range(2)], [], torch.cuda.graph_pool_handle()
    for graph in graphs:
        with torch.cuda.graph(graph, pool=pool):
            results.append(run())
    for i in (1, 0, 1):
        graphs[i].replay()
        check(results[i], x, w, sum_bits=13)


def test_operators_have_honest_fakes():
    checks = ("test_schema", "test_faketensor")
    codes, scale, zero, _, _ = random_x(20, 128, "int8", with_zero=True)
    operand = w8a8_int8.prepare(random_weight(64, 128, "int8")[0])
    torch.library.opcheck(w8a8_int8.w8a8_int8, (codes, scale, zero, *operand, None, BF16), test_utils=checks)
    codes, scale, _, _, _ = random_x(20, 128, "fp8")
    operand = w8a8_fp8.prepare(random_weight(64, 128, "fp8")[0])
    args = (codes, scale, operand.codes_NK, operand.scale, None, 64, BF16)
    torch.library.opcheck(
        w8a8_fp8.w8a8_fp8, args, test_utils=checks[1:]
    )  # the others have no arithmetic in FP8
    codes, scale, _, _, _ = random_x(20, 128, "int8")
    operand = strip_weight.prepare(random_weight(64, 128, "int4")[0])
    args = (codes, scale, None, operand.stored, operand.scale, None, None, None, 64, 0, BF16)
    torch.library.opcheck(w4a8.w4a8, args, test_utils=checks)
