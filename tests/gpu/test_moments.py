"""Moments of columns against float64."""

import math

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: it comes with CUDA builds of torch")

from quantkit_kernels.moments import Moments, column_moments
from quantkit_kernels.moments_kernel import launch
from tests.gpu.triton_device import DEVICE, IS_INTERPRETED, generator, needs_gpu, needs_kernels, poisoned  # noqa: F401

pytestmark = [*needs_kernels, pytest.mark.usefixtures("poisoned")]
EPS = torch.finfo(torch.float32).eps
SHAPES = (
    [(1, 1), (37, 300), (600, 24)] if IS_INTERPRETED else [(1, 1), (37, 300), (8191, 4096), (1030, 14336)]
)


@pytest.mark.parametrize(("num_tokens", "num_features"), SHAPES)
def test_sums_are_those_of_float64(num_tokens, num_features):
    x_TK = torch.randn(num_tokens, num_features, generator=generator(0)).to(DEVICE)
    whole_TK = torch.full((num_tokens, num_features + 8), torch.nan, device=DEVICE)
    whole_TK[:, 8:] = x_TK
    got = Moments(*launch(whole_TK[:, 8:]))
    exact_TK = x_TK.double()
    bound_K = (num_tokens + 2) * EPS * exact_TK.abs().sum(dim=0)
    assert ((got.sum_K - exact_TK.sum(dim=0)).abs() <= bound_K).all()
    assert ((got.abs_K - exact_TK.abs().sum(dim=0)).abs() <= bound_K).all()
    squares_K = exact_TK.square().sum(dim=0)
    assert ((got.square_K - squares_K).abs() <= (num_tokens + 2) * EPS * squares_K).all()
    assert torch.equal(got.max_K, x_TK.abs().amax(dim=0))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("row", [0, 530, 599])
def test_what_is_not_finite_shows_in_each_of_the_four(value, row):
    x_TK = torch.randn(600, 24, generator=generator(0))
    x_TK[row, 3] = value
    for got_K in launch(x_TK.to(DEVICE)).cpu():
        assert (~torch.isfinite(got_K)).nonzero().flatten().tolist() == [3]
        assert bool(got_K[3].isnan()) == math.isnan(value)


@needs_gpu
def test_bfloat16_and_repeated_runs():
    x_TK = torch.randn(8191, 4096, generator=generator(0)).to(DEVICE, torch.bfloat16)
    first = launch(x_TK)
    for _ in range(20):
        assert torch.equal(first, launch(x_TK))
    torch.library.opcheck(column_moments, (x_TK,), test_utils=("test_schema", "test_faketensor"))
