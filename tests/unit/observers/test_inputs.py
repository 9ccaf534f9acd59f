"""Statistics of an input against float64, whatever the chunks they came in."""

import pytest
import torch

from quantkit.errors import CalibrationError
from quantkit.observers.inputs import SAMPLE_ROWS, InputStats

CPU = torch.device("cpu")


def inputs(num_tokens: int = 300, num_features: int = 224, seed: int = 0) -> torch.Tensor:
    """Correlated inputs with a mean, and channels of very different size."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(num_tokens, num_features, generator=generator) @ torch.randn(
        num_features, num_features, generator=generator
    )
    return (mixed + 3) * torch.logspace(-2, 1, num_features)


def observed(*parts: torch.Tensor, with_hessian: bool = True) -> InputStats:
    stats = InputStats(parts[0].shape[-1], device=CPU, with_hessian=with_hessian)
    for part in parts:
        stats.add(part)
    return stats


@pytest.mark.parametrize("num_features", [1, 95, 96, 97, 224, 577])
def test_the_hessian_is_the_mean_of_outer_products(num_features):
    x_TK = inputs(num_features=num_features)
    exact = x_TK.double().T @ x_TK.double() / len(x_TK)
    hessian = observed(x_TK[:100], x_TK[100:]).hessian_KK
    assert torch.equal(hessian, hessian.T)
    size = exact.diagonal().sqrt()
    assert ((hessian - exact).abs() <= 1e-5 * size[:, None] * size).all()


def test_asking_in_between_changes_nothing():
    x_TK = inputs()
    stats = InputStats(224, device=CPU, with_hessian=True)
    stats.add(x_TK[:50])
    _ = stats.hessian_KK
    stats.add(x_TK[50:])
    assert torch.equal(stats.hessian_KK, observed(x_TK[:50], x_TK[50:]).hessian_KK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_hessian", [True, False])
def test_moments_are_those_of_float64(dtype, with_hessian):
    x_TK = inputs(9000, 40).div(100).to(dtype)  # more than a chunk
    stats, exact = observed(x_TK, with_hessian=with_hessian), x_TK.double()
    assert stats.num_tokens == 9000
    torch.testing.assert_close(stats.mean_K.double(), exact.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stats.absmean_K.double(), exact.abs().mean(0), rtol=1e-4, atol=0)
    torch.testing.assert_close(stats.second_moment_K.double(), exact.square().mean(0), rtol=1e-4, atol=0)
    assert torch.equal(stats.absmax_K.double(), exact.abs().amax(0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_count_for_nothing(bad):
    x_TK = inputs()
    spoiled = x_TK.clone()
    spoiled[[3, 77], [5, 0]] = bad
    kept = torch.ones(len(x_TK), dtype=torch.bool)
    kept[[3, 77]] = False
    stats, clean = observed(spoiled), observed(x_TK[kept])
    assert (stats.num_tokens, stats.num_excluded) == (len(x_TK) - 2, 2)
    for name in ("hessian_KK", "mean_K", "absmean_K", "absmax_K"):
        assert torch.equal(getattr(stats, name), getattr(clean, name)), name
    assert torch.equal(stats.sample(), clean.sample())


def test_finite_rows_whose_sum_overflows_are_kept():
    x_TK = torch.full((4, 8), 3e38)
    stats = observed(x_TK, with_hessian=False)
    assert (stats.num_tokens, stats.num_excluded) == (4, 0)
    assert torch.equal(stats.absmax_K, x_TK[0])


def test_an_input_that_was_never_finite_is_refused():
    stats = observed(torch.full((4, 8), torch.nan))
    for name in ("hessian_KK", "second_moment_K", "mean_K", "absmax_K"):
        with pytest.raises(CalibrationError, match="4 were NaN"):
            getattr(stats, name)


def test_the_sample_depends_on_the_tokens_and_not_on_their_chunks():
    x_TK = torch.arange(5 * SAMPLE_ROWS + 7, dtype=torch.float32).unsqueeze(1)
    at_once = observed(x_TK).sample()
    in_parts = observed(*x_TK.split([1, 30, 2 * SAMPLE_ROWS, 3, 3 * SAMPLE_ROWS - 27])).sample()
    assert torch.equal(at_once, in_parts)
    assert SAMPLE_ROWS // 2 < len(at_once) <= SAMPLE_ROWS
    assert len((at_once[1:] - at_once[:-1]).unique()) == 1  # evenly spread, from the first row on
    assert at_once[0] == 0


def test_a_short_input_is_its_own_sample():
    x_TK = inputs(20, 8)
    assert torch.equal(observed(x_TK[:7], x_TK[7:]).sample(), x_TK)


def test_the_shift_is_the_mean_product_with_what_the_original_had_more():
    x_TK, original_TK = inputs(seed=1), inputs(seed=2)
    stats = InputStats(224, device=CPU, with_hessian=True, with_shift=True)
    for rows in (slice(0, 11), slice(11, 300)):
        stats.add(x_TK[rows], original_TK[rows])
    exact = (original_TK.double() - x_TK.double()).T @ x_TK.double() / len(x_TK)
    scale = (original_TK - x_TK).square().mean(0).sqrt()[:, None] * x_TK.square().mean(0).sqrt()
    assert ((stats.shift_KK - exact).abs() <= 1e-5 * scale).all()


def test_leading_dimensions_are_tokens():
    x_TK = inputs(60, 16)
    assert torch.equal(observed(x_TK.view(3, 20, 16)).hessian_KK, observed(x_TK).hessian_KK)
