"""Launches of Triton kernels are told apart where Triton tells them apart."""

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: it comes with CUDA builds of torch")

from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import native_specialize_impl

from quantkit_kernels.triton_launch import _key

NUMBERS = (
    -16,
    -1,
    0,
    1,
    2,
    15,
    16,
    17,
    32,
    33,
    49,
    2**31 - 1,
    2**31,
    2**31 + 1,
    2**32 + 1,
    False,
    True,
    1.0,
    0.5,
    None,
)


def variant_of(argument):
    """What Triton makes a variant for."""
    return native_specialize_impl(CUDABackend, argument, False, True, True)


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(NUMBERS, 2)))
def test_numbers_of_two_variants_have_two_keys(one, other):
    assert _key((one,), 4) != _key((other,), 4) or variant_of(one) == variant_of(other)


@pytest.mark.parametrize(
    ("one", "other"), [(17, 33), (16, 32), (0, 4096), (2, 15), (False, True), (0.5, 2.0)]
)
def test_numbers_of_one_variant_have_one_key(one, other):
    assert variant_of(one) == variant_of(other) and _key((one,), 4) == _key((other,), 4)


def test_tensors_are_told_apart_by_dtype_and_alignment():
    bytes_ = torch.zeros(64, dtype=torch.int8)
    aligned = bytes_[-bytes_.data_ptr() % 16 :]
    keys = [_key((tensor,)) for tensor in (aligned, aligned[1:], aligned.view(torch.uint8), aligned[16:])]
    assert keys[0] == keys[3] and len(set(keys)) == 3
