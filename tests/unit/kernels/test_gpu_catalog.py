"""The table of families: which weight goes to which, and what is said where none takes it."""

import pytest
import torch

from quantkit_kernels import catalog
from quantkit_kernels.catalog import (
    BLOCK,
    CHANNEL,
    GPU_FAMILIES,
    TENSOR,
    UnsupportedError,
    WeightFormat,
    find_gpu,
    format_of,
)
from quantkit_kernels.weight import LinearWeight
from tests.unit.kernels.families import FAMILY

BF16, FP8, INT8 = torch.bfloat16, torch.float8_e4m3fn, torch.int8


@pytest.fixture
def loaded(monkeypatch):
    """Families without their kernels."""
    monkeypatch.setattr(catalog.GpuFamily, "load", lambda entry: FAMILY)


def quantized(bits=4, codes=INT8, tile=(1, 128), has_zero_points=False):
    return WeightFormat(bits, codes, tile, has_zero_points)


@pytest.mark.parametrize(
    ("weight", "x", "name"),
    [
        (quantized(), BF16, "w4a16"),
        (quantized(tile=(1, 32), has_zero_points=True), torch.float16, "w4a16"),
        (quantized(tile=CHANNEL), INT8, "w4a8_int8"),
        (quantized(), FP8, "w4a8_fp8"),
        (quantized(8, FP8, CHANNEL), BF16, "w8a16"),
        (quantized(8, INT8, (1, 64)), BF16, "w8a16"),
        (quantized(8, FP8, BLOCK), FP8, "w8a8_fp8_block"),
        (quantized(8, INT8, TENSOR), INT8, "w8a8_int8"),
        (quantized(16, BF16, TENSOR), BF16, "dense16"),
    ],
)
def test_a_weight_finds_its_family(weight, x, name, loaded):
    assert find_gpu(weight, x, (9, 0))[0].name == name


@pytest.mark.parametrize(
    ("weight", "x", "reason", "nearest"),
    [
        (
            quantized(tile=(1, 256)),
            BF16,
            "w4a16 takes scales per group of 128, group of 64, group of 32, channel, tensor, not group of 256",
            "w4a16",
        ),
        (quantized(2), BF16, "w4a16 takes weights of 4 bits, not 2", "w4a16"),
        (
            quantized(8, INT8, CHANNEL),
            FP8,
            "w8a16 takes inputs in bfloat16 or float16, not float8_e4m3fn",
            "w8a16",
        ),
        (
            quantized(8, INT8, CHANNEL, True),
            INT8,
            "w8a8_int8 takes no zero points of int8 codes",
            "w8a8_int8",
        ),
        (
            quantized(8, FP8, CHANNEL, True),
            BF16,
            "w8a16 takes no zero points of float8_e4m3fn codes",
            "w8a16",
        ),
        (quantized(), torch.float32, "w4a16 takes inputs in bfloat16 or float16, not float32", "w4a16"),
    ],
)
def test_what_no_family_takes_is_told_the_nearest(weight, x, reason, nearest, loaded):
    with pytest.raises(UnsupportedError) as error:
        find_gpu(weight, x, (9, 0))
    assert (error.value.reason, error.value.nearest) == (reason, nearest)
    assert str(error.value).endswith(f"on compute capability 9.0: {reason}")


def test_a_device_that_is_too_old(loaded):
    with pytest.raises(UnsupportedError, match=r"takes devices of compute capability 8\.0") as error:
        find_gpu(quantized(), BF16, (7, 5))
    assert error.value.nearest is None


@pytest.mark.parametrize(
    ("weight", "x", "nearest"),
    [
        (quantized(8, FP8, CHANNEL), FP8, "w8a16"),
        (quantized(8, FP8, BLOCK), FP8, "w8a16"),
        (quantized(), FP8, "w4a16"),
    ],
)
def test_a_device_without_the_arithmetic_is_told_who_takes_16_bits(weight, x, nearest):
    with pytest.raises(UnsupportedError, match="inputs in 16 bits on this one") as error:
        find_gpu(weight, x, (8, 0))
    assert error.value.nearest == nearest
    assert find_gpu(weight, BF16, (8, 0))[0].name == nearest


def test_an_error_says_what_was_asked_for(loaded):
    with pytest.raises(UnsupportedError) as error:
        find_gpu(quantized(8, INT8, CHANNEL, True), INT8, (9, 0))
    assert str(error.value) == (
        "no kernel for weights of 8 bits in int8 with a scale per channel and zero points with inputs in int8 "
        "on compute capability 9.0: w8a8_int8 takes no zero points of int8 codes"
    )


def test_the_format_of_a_weight():
    codes = torch.zeros(6, 256, dtype=INT8)

    def tile(rows, cols):
        return format_of(LinearWeight(codes, torch.ones(1, 1), None, (rows, cols), 8)).tile

    assert [tile(*of) for of in ((1, 64), (1, 256), (6, 256), (2, 256), (128, 128))] == [
        (1, 64),
        CHANNEL,
        TENSOR,
        TENSOR,
        BLOCK,
    ]


def test_names_are_unique():
    assert len({entry.name for entry in GPU_FAMILIES}) == len(GPU_FAMILIES)
