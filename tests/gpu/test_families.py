"""Every route of every family in the catalog: called in one way, it computes the product; and what dispatch chooses."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: it comes with CUDA builds of torch")

from quantkit.bench.contenders import random_input, random_weight
from quantkit_kernels.catalog import GPU_FAMILIES
from quantkit_kernels.dispatch import choose
from tests.gpu.triton_device import poisoned  # noqa: F401

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.usefixtures("poisoned"),
]
ROWS = (1, 17, 33, 257)
SHAPES = ((256, 512), (1000, 640))


def random_operand(entry, family, n, k):
    """Of the format that the bench measures, and float64 [N, K] of it."""
    device = torch.device("cuda", torch.cuda.current_device())
    if entry.bits == 16:
        w = torch.randn(n, k, dtype=entry.codes[0], device=device)
        return family.prepare(w), w.double()
    weight = random_weight(entry.bits, entry.codes[0], entry.tiles[0], n, k, device)
    rows, cols = weight.tile
    scale = weight.scale_RG.double().repeat_interleave(rows, 0).repeat_interleave(cols, 1)
    return family.prepare(weight), weight.codes_NK.double() * scale[:n, :k]


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("entry", GPU_FAMILIES, ids=lambda entry: entry.name)
def test_routes(entry, n, k):
    """Within one rounding of the output, one of each weight, and sums of 14 bits, as FP8 tensor cores keep them."""
    torch.manual_seed(0)
    family, device = entry.load(), torch.device("cuda", torch.cuda.current_device())
    operand, w = random_operand(entry, family, n, k)
    for num_rows in ROWS:
        routes = family.usable(num_rows, torch.cuda.get_device_capability(device))
        assert choose(family, num_rows, n, k, device) in routes
        assert choose(family, num_rows, n, k, device, batch_invariant=True) in routes
        x, more = random_input(entry.inputs[0], num_rows, k, device)
        exact = x.double() * more["x_scale"].double() if more else x.double()
        expected, magnitude = exact @ w.T, exact.abs() @ w.abs().T
        sum_bits = 14 if entry.inputs[0] == torch.float8_e4m3fn else 24
        for route in routes:
            y = route.run(x, operand, **more)
            eps = torch.finfo(y.dtype).eps
            bound = eps * expected.abs() + (eps / 2 + 2.0 ** (3 - sum_bits)) * magnitude
            worst = ((y.double() - expected).abs() / bound).max()
            assert worst <= 1, f"{route.name} of {num_rows} rows: {worst:.2f} of the bound"
