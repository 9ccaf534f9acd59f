"""Products of 8-bit weights with few rows against float64, from the same codes."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: it comes with CUDA builds of torch")

from quantkit_kernels import byte_stream
from quantkit_kernels.byte_stream import Shape
from quantkit_kernels.strip_weight import prepare
from quantkit_kernels.weight import LinearWeight
from quantkit_kernels.weight_only import STREAM
from tests.gpu.triton_device import generator, poisoned, side_by_side  # noqa: F401

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="no Hopper GPU"
    ),
    pytest.mark.usefixtures("poisoned"),
]
ROWS = (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 32, 33, 63, 64)
SHAPES = ((4096, 4096), (6000, 640), (28000, 400), (33, 208), (129, 4160), (1000, 1536), (16, 16))
CODES = ("int8", "fp8", "blocks")
WIDE = ("int8 x bfloat16", "fp8 x bfloat16", "int8 x float16", "fp8 x float16")
KINDS = CODES + WIDE


def random_codes(rows, cols, kind, seed):
    draw = torch.Generator("cuda").manual_seed(seed)
    if kind.startswith("int8"):
        return torch.randint(-128, 128, (rows, cols), generator=draw, dtype=torch.int8, device="cuda")
    values = torch.randn(rows, cols, generator=draw, device="cuda") * 100
    return values.clamp(-448, 448).to(torch.float8_e4m3fn)


def random_product(m, n, k, kind, *, is_static=False, with_zero=False):
    """Arguments of `multiply`; float64 of the product, and of what the error of sums is measured by."""
    if kind in WIDE:
        return random_wide_product(m, n, k, kind)
    x, w = random_codes(m, k, kind, 1), random_codes(n, k, kind, 2)
    draw, blocks = generator(3), -(-k // 128)
    x_grid = (m, blocks) if kind == "blocks" else (1,) if is_static else (m, 1)
    w_grid = (-(-n // 128), blocks) if kind == "blocks" else (n,)
    x_scale, w_scale = ((torch.rand(grid, generator=draw) + 0.1).cuda() for grid in (x_grid, w_grid))
    more = {}
    offset = torch.zeros(1, device="cuda")
    if with_zero:
        offset = torch.randint(-128, 128, x_grid, generator=draw, dtype=torch.int8).cuda()
        more = {"zero_point": offset, "code_sum_N": w.sum(dim=1, dtype=torch.int32)}
    if kind == "blocks":
        x_true = x.double() * x_scale.double().repeat_interleave(128, 1)[:, :k]
        rows = torch.arange(n, device="cuda") // 128
        w_true = w.double() * w_scale.double()[rows].repeat_interleave(128, 1)[:, :k]
    else:
        x_true, w_true = (
            (x.double() - offset.double()) * x_scale.double(),
            w.double() * w_scale.double()[:, None],
        )
    magnitude = (
        x_true.abs() if not with_zero else (x.double().abs() + offset.double().abs()) * x_scale.double()
    )
    return (x, x_scale, w, w_scale), more, x_true @ w_true.T, magnitude @ w_true.abs().T


def random_wide_product(m, n, k, kind):
    """x in 16 bits, which has no scale; exact products, K / 16 sums in float32 and some of parts."""
    x = torch.randn(m, k, generator=generator(1)).to(getattr(torch, kind.split(" x ")[1])).cuda()
    w, w_scale = random_codes(n, k, kind, 2), (torch.rand(n, generator=generator(3)) + 0.1).mul(0.01).cuda()
    w_true = w.double() * w_scale.double()[:, None]
    magnitude = x.double().abs() @ w_true.abs().T
    return (x, None, w, w_scale), {}, x.double() @ w_true.T, magnitude * (k / 16 + 16) / 2


def check(y, expected, magnitude, kind):
    """One rounding of the output, three of scales; FP8 sums keep 14 bits of their largest product."""
    eps = torch.finfo(y.dtype).eps
    sums = 2.0**-11 if kind in ("fp8", "blocks") else 0
    bound = eps * expected.abs() + (2.0**-21 + sums) * magnitude
    error = (y.double() - expected).abs()
    assert torch.isfinite(y).all()
    assert (error <= bound).all(), f"{(error / bound).max():.2f} of the bound"


def multiply(args, n, dtype=torch.bfloat16, **more):
    x, x_scale, w, w_scale = args
    return byte_stream.stream(x, w, w_scale, num_outputs=n, out_dtype=dtype, x_scale=x_scale, **more)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_every_number_of_rows(n, k, kind):
    for m in ROWS:
        args, more, expected, magnitude = random_product(m, n, k, kind, with_zero=kind == "int8")
        check(multiply(args, n, **more), expected, magnitude, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_options(dtype, kind):
    n, k = 200, 400
    bias = torch.randn(n, generator=generator(7)).to(dtype).cuda()
    for m in (1, 33):
        args, more, expected, magnitude = random_product(m, n, k, kind, is_static=True)
        if dtype == torch.float16 and kind in CODES:
            args = (args[0], args[1] * 2.0**-12, *args[2:])
            expected, magnitude = expected * 2.0**-12, magnitude * 2.0**-12
        check(multiply(args, n, dtype, bias_N=bias, **more), expected + bias.double(), magnitude, kind)


CUTS = [
    Shape(16, 1, 1, 1, 4, 2),
    Shape(48, 1, 2, 4, 3, 2),
    Shape(112, 2, 2, 2, 2, 2),
    Shape(256, 1, 1, 1, 2, 3),
    Shape(64, 1, 2, 2, 3, 2),
    Shape(32, 4, 4, 8, 2, 1),
    Shape(32, 1, 1, 2, 6, 4),
]


CLUSTERS = [
    Shape(16, 1, 1, 1, 4, 2, split=2),
    Shape(64, 2, 2, 4, 3, 2, split=2),
    Shape(96, 1, 1, 2, 3, 2, split=4),
    Shape(32, 1, 1, 2, 6, 4, split=2),
]


@pytest.mark.parametrize("shape", CLUSTERS)
@pytest.mark.parametrize("kind", WIDE)
def test_blocks_of_a_cluster_share_columns(kind, shape):
    """Several tiles for each, and fewer columns than blocks."""
    for m, n, k in ((17, 20000, 400), (33, 1000, 4160), (60, 28000, 2000), (64, 40, 16)):
        args, _, expected, magnitude = random_product(m, n, k, kind)
        results = [multiply(args, n, shape=shape) for _ in range(10)]
        check(results[0], expected, magnitude, kind)
        assert all(torch.equal(y, results[0]) for y in results)


@pytest.mark.parametrize("shape", CUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_parts_add_up_in_order(kind, shape):
    for m in (5, 17, 60):
        args, _, expected, magnitude = random_product(m, 1000, 4160, kind)
        results = [multiply(args, 1000, shape=shape) for _ in range(10)]
        check(results[0], expected, magnitude, kind)
        assert all(torch.equal(y, results[0]) for y in results)


def test_int8_sums_are_exact():
    """The largest codes over as many columns as the format takes."""
    n, k = 64, (1 << 16) - 16
    w, x = (
        torch.full((rows, k), code, dtype=torch.int8, device="cuda") for rows, code in ((n, -128), (33, 127))
    )
    zero = torch.full((1,), -128, dtype=torch.int8, device="cuda")
    code_sum, ones = w.sum(dim=1, dtype=torch.int32), torch.ones(n, device="cuda")
    y = multiply((x, ones[:1], w, ones), n, torch.float32, zero_point=zero, code_sum_N=code_sum)
    assert torch.equal(y, torch.full_like(y, -128 * 255 * k))


def surrounded(values):
    """The same amid NaN, or −1."""
    rows, cols = values.shape
    size = values.element_size()
    around = torch.full((rows + 2, (cols + 24) * size), -1, dtype=torch.int8, device="cuda")
    around[:rows, : cols * size] = values.view(torch.int8)
    return around.view(values.dtype)[:rows, :cols]


@pytest.mark.parametrize("kind", KINDS)
def test_what_lies_beyond_x_and_w_is_never_seen(kind):
    for m in (3, 20, 40):
        args, _, expected, magnitude = random_product(m, 72, 200, kind)
        x, w = (surrounded(values) for values in args[::2])
        check(multiply((x, args[1], w, args[3]), 72), expected, magnitude, kind)


@pytest.mark.parametrize("kind", WIDE)
@pytest.mark.parametrize("k", [1, 77, 200, 1000])
def test_any_columns_from_anywhere(k, kind):
    """As a layer calls it: rows that start where no tensor map can, of x and of w."""
    n = 90
    (x, _, w, w_scale), _, expected, magnitude = random_product(5, n, k, kind)
    weight = prepare(LinearWeight(w, w_scale[:, None], None, (1, k), 8))
    bias = torch.randn(n, generator=generator(7)).to(x.dtype).cuda()
    x = torch.cat([x.new_full((5, 1), torch.nan), x], dim=1)[:, 1:]
    check(STREAM.run(x, weight, bias_N=bias), expected + bias.double(), magnitude, kind)


def test_a_weight_beyond_two_billion_codes():
    n, k = 131072 + 64, 16384
    w = torch.zeros(n, k, dtype=torch.int8, device="cuda")
    w[-64:] = random_codes(64, k, "int8", 3)
    x, ones = random_codes(33, k, "int8", 4), torch.ones(n, device="cuda")
    y = multiply((x, ones[:1], w, ones), n, torch.float32)
    assert torch.equal(y[:, -64:], (x.double() @ w[-64:].double().T).float())
    assert not y[:, :-64].any()


@pytest.mark.parametrize("kind", KINDS)
def test_graphs_of_many_launches_in_any_order(kind):
    """A chain that starts early, in two graphs; memory that nobody wrote holds anything."""
    m, n, k = 20, 1000, 4160
    args, _, expected, magnitude = random_product(m, n, k, kind)
    multiply(args, n)
    torch.full((256 << 20,), -1, dtype=torch.int32, device="cuda")
    graphs, results, pool = [torch.cuda.CUDAGraph() for _ in range(2)], [], torch.cuda.graph_pool_handle()
    for graph in graphs:
        with side_by_side(), torch.cuda.graph(graph, pool=pool):
            results.append([multiply(args, n) for _ in range(20)])
    for i in (1, 0, 1):
        graphs[i].replay()
        for y in results[i]:
            check(y, expected, magnitude, kind)
            y.fill_(torch.nan)
