"""The scale search kernel against the search in float64 by the formulas of `numerics.affine`."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: it comes with CUDA builds of torch")

from quantkit.numerics import affine
from quantkit.schemes.tiles import round_scale
from quantkit_kernels.scale_search import Candidates, scale_search
from quantkit_kernels.scale_search_kernel import launch
from tests.gpu.triton_device import DEVICE, IS_INTERPRETED, generator, needs_gpu, needs_kernels, poisoned  # noqa: F401

pytestmark = [*needs_kernels, pytest.mark.usefixtures("poisoned")]
COARSE = Candidates((1.0, 0.92, 0.84, 0.76, 0.68, 0.60), (0.04, -0.04, 0.02, -0.02))
EVEN = Candidates(tuple(0.5 + 0.01 * step for step in range(61)), ())
QMIN, QMAX = -8, 7


def weights(num_tiles: int, size: int, seed: int = 0) -> torch.Tensor:
    """Gaussian tiles with a few large weights; the first rows are zeros, tiny and huge."""
    random = generator(seed)
    tiles = torch.randn(num_tiles, size, generator=random)
    tiles *= 1 + 6 * (torch.rand(num_tiles, size, generator=random) < 0.02)
    for row, factor in enumerate((0.0, 1e-30, 1e30)[: num_tiles - 1]):
        tiles[row] *= factor
    return tiles


def judge(tiles, importance, scale, zero_point, grid):
    """Error of each tile at a scale, float64, in units of its largest weight."""
    unit = tiles.abs().amax(dim=-1, keepdim=True).clamp(min=1e-38).double()
    if grid == "e4m3":
        values = affine.quantize_e4m3(tiles, scale).double() * scale.double()
    else:
        codes = affine.quantize_int(tiles, scale, zero_point, QMIN, QMAX).double()
        values = (codes - (0 if zero_point is None else zero_point.double())) * scale.double()
    error = ((values - tiles.double()) / unit).abs()
    return (error**2.5 if importance is None else error**2 * importance.double()).sum(dim=-1, keepdim=True)


def search(tiles, importance, candidates, grid, dtype):
    """The definition, float64 errors: best error, scale and zero point of each tile."""
    low = tiles.amin(dim=-1, keepdim=True).clamp(max=0)
    base = affine.choose_symmetric(tiles, 448 if grid == "e4m3" else (QMAX - QMIN) / 2)
    if grid == "asymmetric":
        base, _ = affine.choose_asymmetric(tiles, QMIN, QMAX)
    if grid == "either sign":
        base = torch.where(tiles.amax(dim=-1, keepdim=True) > -low, -base, base)
    best_error, best_ratio = torch.full_like(base, torch.inf, dtype=torch.float64), torch.zeros_like(base)
    best_scale, best_zero = torch.zeros_like(base), torch.zeros_like(base)
    for kind, values in enumerate(candidates):
        for value in values:
            ratio = best_ratio + value if kind else torch.full_like(base, value)
            scale = round_scale(base * ratio, dtype).float()
            zero = affine.choose_zero_point(low * ratio, scale, QMIN, QMAX) if grid == "asymmetric" else None
            error = judge(tiles, importance, scale, zero, grid)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_ratio = torch.where(better, ratio, best_ratio)
            best_scale = torch.where(better, scale, best_scale)
            best_zero = best_zero if zero is None else torch.where(better, zero, best_zero)
    return best_error, best_scale.to(dtype), best_zero.to(torch.int8)


def check(tiles, importance, candidates, grid, dtype, num_exact=0.99):
    """Nearly every tile gets the very scale of the definition; where rounding decides otherwise, as good a one."""
    on_device = None if importance is None else importance.to(DEVICE)
    scale, zero = launch(tiles.to(DEVICE), on_device, candidates, grid, QMIN, QMAX, dtype)
    scale, zero = scale.cpu().unsqueeze(-1), zero.cpu().unsqueeze(-1)
    if importance is not None:
        importance = importance[torch.arange(len(tiles)) % len(importance)]
    error, expected, expected_zero = search(tiles.float(), importance, candidates, grid, dtype)
    assert scale.dtype == dtype
    assert torch.isfinite(scale).all()
    is_same = (scale == expected) & (zero == expected_zero)
    assert is_same.double().mean() >= num_exact
    ours = judge(tiles.float(), importance, scale.float(), zero if grid == "asymmetric" else None, grid)
    assert (ours <= error * 1.02 + 1e-30).all()
    assert ours.sum() <= error.sum() * (1 + 1e-4)


SHAPES = (
    [(7, 32), (40, 128), (3, 192)]
    if IS_INTERPRETED
    else [(1, 32), (1000, 64), (4099, 128), (5, 576), (33, 14336)]
)
GRIDS = ["symmetric", "either sign", "asymmetric", "e4m3"]


@pytest.mark.parametrize(("num_tiles", "size"), SHAPES)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("with_importance", [False, True])
def test_it_finds_the_scales_of_the_definition(num_tiles, size, grid, with_importance):
    importance = None
    if with_importance:
        importance = torch.rand(min(num_tiles, 3), size, generator=generator(1)).square()
    check(weights(num_tiles, size), importance, COARSE, grid, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("grid", ["either sign", "asymmetric"])
def test_scales_are_rounded_to_their_dtype_before_they_are_judged(grid, dtype):
    tiles = weights(40, 64)
    tiles[2] = 0  # 1e30 is beyond float16
    check(tiles, None, COARSE, grid, dtype)


def test_an_even_grid_of_ratios():
    check(weights(40, 64), torch.rand(2, 64, generator=generator(1)), EVEN, "either sign", torch.bfloat16)


def test_it_is_the_same_every_time():
    tiles = weights(300, 64).to(DEVICE)
    first = launch(tiles, None, COARSE, "asymmetric", QMIN, QMAX, torch.bfloat16)
    for _ in range(1 if IS_INTERPRETED else 20):
        again = launch(tiles, None, COARSE, "asymmetric", QMIN, QMAX, torch.bfloat16)
        assert all(map(torch.equal, first, again))


@needs_gpu
@pytest.mark.parametrize("grid", GRIDS)
def test_bfloat16_weights(grid):
    check(weights(4099, 128).bfloat16(), None, COARSE, grid, torch.bfloat16)


@needs_gpu
def test_the_operator_and_its_fake_agree():
    arguments = (
        weights(40, 64).to(DEVICE),
        None,
        *map(list, COARSE),
        "either sign",
        QMIN,
        QMAX,
        torch.bfloat16,
    )
    torch.library.opcheck(scale_search, arguments, test_utils=("test_schema", "test_faketensor"))
