"""The one formula: published numbers, and what has to hold for every tile."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given
from hypothesis import strategies as st

from quantkit.numerics.affine import (
    E4M3_MAX,
    TINY,
    choose_asymmetric,
    choose_symmetric,
    dequantize,
    quantize_e4m3,
    quantize_int,
)


def test_published_scales_of_a_range_from_minus_3_to_5():
    tile = torch.tensor([[-3.0, 0.5, 5.0]])
    scale, zero_point = choose_asymmetric(tile, -8, 7)
    torch.testing.assert_close(scale, torch.tensor([[8 / 15]]))
    assert zero_point.tolist() == [[-2]]
    torch.testing.assert_close(choose_symmetric(tile, 7.5), torch.tensor([[5 / 7.5]]))


@given(st.integers(0, 2**31), st.sampled_from([2, 4, 8]), st.floats(-2, 2), st.booleans())
def test_min_max_is_the_packages_min_max(seed, bits, shift, symmetric):
    tile = torch.randn(3, 16, generator=torch.Generator().manual_seed(seed)) + shift
    qmin, qmax = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="channel")
    theirs = calculate_qparams(tile.amin(-1, keepdim=True), tile.amax(-1, keepdim=True), args)
    if symmetric:
        assert torch.equal(choose_symmetric(tile, (qmax - qmin) / 2), theirs[0])
    else:
        scale, zero_point = choose_asymmetric(tile, qmin, qmax)
        assert torch.equal(scale, theirs[0])
        assert torch.equal(zero_point.to(torch.int8), theirs[1])


@given(st.integers(0, 2**31), st.sampled_from([2, 4, 8]), st.floats(-2, 2))
def test_asymmetric_error_is_at_most_a_step(seed, bits, shift):
    tile = torch.randn(2, 32, generator=torch.Generator().manual_seed(seed)) + shift
    qmin, qmax = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    scale, zero_point = choose_asymmetric(tile, qmin, qmax)
    codes = quantize_int(tile, scale, zero_point, qmin, qmax)
    assert codes.dtype == torch.int8
    error = (dequantize(codes, scale, zero_point) - tile).abs()
    assert (error <= scale * 1.0001).all()  # half a step from the codes, half from rounding the zero point


def test_zero_is_always_exact():
    for tile in (torch.tensor([[3.0, 5.0, 0.0]]), torch.tensor([[-3.0, -5.0, 0.0]])):
        scale, zero_point = choose_asymmetric(tile, -8, 7)
        codes = quantize_int(tile, scale, zero_point, -8, 7)
        assert dequantize(codes, scale, zero_point)[0, 2] == 0


def test_halves_round_to_even_and_out_of_range_saturates():
    codes = quantize_int(torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 100, -100]), torch.ones(1), None, -8, 7)
    assert codes.tolist() == [0, 2, 2, 0, -2, 7, -8]


def test_an_all_zero_tile_has_a_positive_scale_and_zero_codes():
    tile = torch.zeros(1, 4)
    assert choose_symmetric(tile, 7.5).item() == TINY
    scale, zero_point = choose_asymmetric(tile, -8, 7)
    assert scale.item() == TINY
    assert dequantize(quantize_int(tile, scale, zero_point, -8, 7), scale, zero_point).abs().max() == 0


def test_e4m3_saturates_instead_of_turning_into_nan():
    codes = quantize_e4m3(torch.tensor([1e9, -1e9, 448, 449, 0.0]), torch.ones(1))
    assert codes.float().tolist() == [E4M3_MAX, -E4M3_MAX, 448, 448, 0]


def test_dequantize_is_exact_in_float32():
    codes = torch.arange(-128, 128).to(torch.int8)
    scale = torch.tensor([0.0123], dtype=torch.bfloat16)
    expected = [float(code + 3) * float(scale) for code in range(-128, 128)]
    assert dequantize(codes, scale, torch.tensor([-3], dtype=torch.int8)).tolist() == pytest.approx(
        expected, abs=0
    )
