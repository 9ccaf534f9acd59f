"""Rotations against dense float64 matrices: orthogonal, flat where a Hadamard matrix exists, seeded."""

from functools import reduce

import pytest
import torch

from quantkit.numerics.hadamard import Rotation, random_rotation, rotate

# hidden sizes and head_dims of released models, then sizes that have no Hadamard matrix at all
FLAT = [
    1,
    2,
    4,
    12,
    20,
    28,
    36,
    40,
    60,
    64,
    80,
    84,
    96,
    128,
    256,
    576,
    896,
    960,
    1152,
    1536,
    2304,
    2560,
    2880,
    5376,
]
UNEVEN = [3, 6, 43, 45, 92, 172, 344]


def dense(rotation: Rotation) -> torch.Tensor:
    """R as one float64 matrix, from its definition."""
    product = reduce(torch.kron, rotation.factors, torch.ones(1, 1, dtype=torch.float64))
    return rotation.signs_K.diag() @ product


@pytest.mark.parametrize("size", [size for size in FLAT if size <= 1536] + UNEVEN)
def test_orthogonal_to_float64_error(size):
    matrix = dense(random_rotation(size, seed=0))
    assert matrix.shape == (size, size)
    error = (matrix @ matrix.T - torch.eye(size, dtype=torch.float64)).abs().max()
    assert error < 1e-14 * size**0.5


@pytest.mark.parametrize("size", FLAT)
def test_every_entry_has_the_same_magnitude(size):
    factors = random_rotation(size, seed=0).factors
    for factor in factors:
        torch.testing.assert_close(
            factor.abs(), torch.full_like(factor, len(factor) ** -0.5), rtol=1e-14, atol=0
        )


@pytest.mark.parametrize("size", UNEVEN)
def test_one_channel_reaches_all_others_also_without_a_hadamard_matrix(size):
    assert dense(random_rotation(size, seed=0)).abs().min() > 0


@pytest.mark.parametrize("size", [1, 12, 64, 92, 576, 960])
def test_rotate_is_the_product_with_the_dense_matrix(size):
    rotation = random_rotation(size, seed=3)
    x = torch.randn(2, 5, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(rotate(x, rotation), x @ dense(rotation), rtol=1e-12, atol=1e-13)


def test_large_sizes_keep_lengths_without_a_dense_matrix():
    rotation = random_rotation(18432, seed=0)
    assert max(len(factor) for factor in rotation.factors) <= 128
    x = torch.randn(3, 18432, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(rotate(x, rotation).norm(dim=-1), x.norm(dim=-1), rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    ("given", "returned"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)]
)
def test_16_bit_tensors_are_rotated_in_float32(given, returned):
    assert rotate(torch.ones(2, 64, dtype=given), random_rotation(64, seed=0)).dtype == returned


def test_a_spike_and_a_constant_both_spread():
    rotation = random_rotation(576, seed=0)
    spike = torch.zeros(576, dtype=torch.float64)
    spike[7] = 24.0
    assert rotate(spike, rotation).abs().max() < 1.0 + 1e-12
    constant = torch.ones(576, dtype=torch.float64)
    assert rotate(constant, rotation).abs().max() < 6.0  # 24 if the signs came last


def test_a_seed_is_one_rotation():
    first, again, other = (random_rotation(172, seed) for seed in (5, 5, 6))
    assert torch.equal(dense(first), dense(again))
    assert not torch.equal(first.signs_K, other.signs_K)
