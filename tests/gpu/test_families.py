"""Every route of every family in the catalog, in every format: called in one way, it computes the product."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: it comes with CUDA builds of torch")

from quantkit.bench.contenders import random_input, random_weight
from quantkit_kernels import product
from quantkit_kernels.catalog import BLOCK, GPU_FAMILIES
from quantkit_kernels.dispatch import choose
from tests.gpu.triton_device import poisoned  # noqa: F401

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.usefixtures("poisoned"),
]
ROWS, BF16 = (1, 17, 33, 257), torch.bfloat16
N, K = 1000, 640
FORMATS = [
    pytest.param(entry, codes, tile, with_zero, id=f"{entry.name}-{codes}-{tile}{'-zero' * with_zero}")
    for entry in GPU_FAMILIES
    for codes in entry.codes
    for tile in entry.tiles
    for with_zero in (False, True)
    if not with_zero or (entry.has_zero_points and codes == torch.int8 and tile == entry.tiles[0])
]


def random_operand(family, bits, codes, tile, with_zero, shape=(N, K)):
    """A prepared weight of a shape [N, K], and float64 of it."""
    n, k = shape
    if bits == 16:
        w = torch.randn(n, k, dtype=codes, device="cuda")
        return family.prepare(w), w.double()
    weight = random_weight(bits, codes, tile, n, k, torch.device("cuda"))
    rows, cols = weight.tile
    if with_zero:
        zero_point = torch.randint(-8, 8, weight.scale_RG.shape, dtype=torch.int8, device="cuda")
        weight = weight._replace(zero_point_RG=zero_point)
    by_weight = torch.arange(n)[:, None] // rows, torch.arange(k)[None, :] // cols
    offset = 0 if weight.zero_point_RG is None else weight.zero_point_RG.double()[by_weight]
    return family.prepare(weight), (weight.codes_NK.double() - offset) * weight.scale_RG.double()[by_weight]


@pytest.mark.parametrize(("entry", "codes", "tile", "with_zero"), FORMATS)
def test_routes(entry, codes, tile, with_zero):
    """Within one rounding of the output, one of each weight, and sums of 14 bits, as FP8 tensor cores keep them."""
    torch.manual_seed(0)
    family, device = entry.load(), torch.device("cuda", torch.cuda.current_device())
    operand, w = random_operand(family, entry.bits, codes, tile, with_zero)
    x_dtype = codes if entry.bits == 16 else entry.inputs[0]
    for num_rows in ROWS:
        routes = family.usable(num_rows, torch.cuda.get_device_capability(device))
        assert choose(family, num_rows, N, K, device) in routes
        x, more = random_input(x_dtype, num_rows, K, device, in_blocks=tile == BLOCK)
        exact = x.double()
        if more:
            exact *= more["x_scale"].double().repeat_interleave(128 if tile == BLOCK else K, dim=1)[:, :K]
        expected, magnitude = exact @ w.T, exact.abs() @ w.abs().T
        sum_bits = 14 if x_dtype == torch.float8_e4m3fn else 24
        for route in routes:
            y = route.run(x, operand, **more)
            half = torch.finfo(y.dtype).eps / 2
            bound = half * expected.abs() + (1 + half) * (half + 2.0 ** (3 - sum_bits)) * magnitude
            worst = ((y.double() - expected).abs() / bound).max()
            assert worst <= 1, f"{route.name} of {num_rows} rows: {worst:.2f} of the bound"


@pytest.mark.parametrize("entry", GPU_FAMILIES, ids=lambda entry: entry.name)
def test_a_weight_that_is_not_where_x_is(entry):
    weight = torch.randn(N, K, dtype=BF16)
    if entry.bits < 16:
        weight = random_weight(entry.bits, entry.codes[0], entry.tiles[0], N, K, torch.device("cpu"))
    prepared = product.prepare(weight, entry.inputs[0], torch.cuda.get_device_capability())
    x, more = random_input(entry.inputs[0], 3, K, torch.device("cuda"), in_blocks=entry.tiles[0] == BLOCK)
    with pytest.raises(AssertionError, match=r"on cuda:0; found .* on cpu"):
        product.multiply(x, prepared, **more)
