"""Every route of every family in the catalog, in every format: called in one way, it computes the product."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: it comes with CUDA builds of torch")

from quantkit.bench.contenders import random_input, random_weight
from quantkit_kernels import weight_only
from quantkit_kernels.catalog import BLOCK, GPU_FAMILIES
from quantkit_kernels.dispatch import choose
from tests.gpu.triton_device import poisoned  # noqa: F401

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.usefixtures("poisoned"),
]
ROWS = (1, 17, 33, 257)
N, K = 1000, 640
FORMATS = [
    pytest.param(entry, codes, tile, with_zero, id=f"{entry.name}-{codes}-{tile}{'-zero' * with_zero}")
    for entry in GPU_FAMILIES
    for codes in entry.codes
    for tile in entry.tiles
    for with_zero in (False, True)
    if not with_zero or (entry.has_zero_points and codes == torch.int8 and tile == entry.tiles[0])
]


def random_operand(family, bits, codes, tile, with_zero):
    """A prepared weight [N, K], and float64 of it."""
    if bits == 16:
        w = torch.randn(N, K, dtype=codes, device="cuda")
        return family.prepare(w), w.double()
    weight = random_weight(bits, codes, tile, N, K, torch.device("cuda"))
    rows, cols = weight.tile
    if with_zero:
        zero_point = torch.randint(-8, 8, weight.scale_RG.shape, dtype=torch.int8, device="cuda")
        weight = weight._replace(zero_point_RG=zero_point)
    by_weight = torch.arange(N)[:, None] // rows, torch.arange(K)[None, :] // cols
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
            eps = torch.finfo(y.dtype).eps
            bound = eps * expected.abs() + (eps / 2 + 2.0 ** (3 - sum_bits)) * magnitude
            worst = ((y.double() - expected).abs() / bound).max()
            assert worst <= 1, f"{route.name} of {num_rows} rows: {worst:.2f} of the bound"


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_row_by_itself_is_the_row_of_a_batch(bits):
    """To the bit, with weights of every kind, where the mode asks for it."""
    torch.manual_seed(0)
    device = torch.device("cuda", torch.cuda.current_device())
    family = weight_only.OF_BITS[bits]
    if bits == 16:
        operand = family.prepare(torch.randn(1000, 640, dtype=torch.bfloat16, device=device))
    else:
        operand = family.prepare(random_weight(bits, torch.int8, (1, 128), 1000, 640, device))
    x = torch.randn(300, 640, dtype=torch.bfloat16, device=device)
    together = weight_only.multiply(x, operand, batch_invariant=True)
    for rows in (slice(0, 1), slice(7, 8), slice(40, 57), slice(299, 300), slice(0, 100)):
        alone = weight_only.multiply(x[rows], operand, batch_invariant=True)
        assert torch.equal(alone, together[rows])
