"""Packing: the published layout, and back again for every code, any width, any memory order."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantkit.numerics.packing import PACKABLE_BITS, pack, packed_width, unpack


def words(packed):
    return [f"{word & 0xFFFFFFFF:08x}" for word in packed.flatten().tolist()]


@pytest.mark.parametrize(
    "bits, codes, expected",
    [
        (4, [-8, -7, 0, 7, 1, 2, 3, 4], ["cba9f810"]),
        (4, [-8, -7, 0, 7, 1], ["0009f810"]),
        (8, [-128, -1, 0, 127], ["ff807f00"]),
        (2, [-2, -1, 0, 1] * 4, ["e4e4e4e4"]),
        (2, [1], ["00000003"]),
        (8, [0, 0, 0, 0, 127], ["80808080", "000000ff"]),
    ],
)
def test_golden_vectors(bits, codes, expected):
    packed = pack(torch.tensor([codes], dtype=torch.int8), bits)
    assert packed.dtype == torch.int32
    assert words(packed) == expected


def test_golden_zero_points_pack_along_the_outputs():
    zero_point = torch.tensor([[-8, 1], [-7, 2], [0, 3], [7, 4]], dtype=torch.int8)
    packed = pack(zero_point.T.contiguous(), 4).T.contiguous()
    assert packed.shape == (1, 2)
    assert words(packed) == ["0000f810", "0000cba9"]


def every_code(bits, num_rows, num_codes, seed):
    """Random codes, the first ones of which run through the whole grid where there is room for it."""
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    codes = torch.randint(low, high, (num_rows * num_codes,), generator=torch.Generator().manual_seed(seed))
    codes[: high - low] = torch.arange(low, high)[: len(codes)]
    return codes.to(torch.int8).view(num_rows, num_codes)


@given(st.sampled_from(PACKABLE_BITS), st.integers(1, 9), st.integers(1, 70), st.integers(0, 2**31))
def test_round_trip_of_any_shape(bits, num_rows, num_codes, seed):
    codes = every_code(bits, num_rows, num_codes, seed)
    packed = pack(codes, bits)
    assert packed.shape == (num_rows, packed_width(num_codes, bits))
    assert torch.equal(unpack(packed, bits, num_codes), codes)
    tail = 32 * packed.shape[1] - num_codes * bits
    last = packed[:, -1].to(torch.int64) & 0xFFFFFFFF
    assert not (last >> (32 - tail)).any(), "unused high bits are 0"


@pytest.mark.parametrize("bits", PACKABLE_BITS)
def test_round_trip_visits_every_code(bits):
    codes = every_code(bits, 3, 256, 0)
    assert len(codes.unique()) == 1 << bits
    assert torch.equal(unpack(pack(codes, bits), bits, 256), codes)


@pytest.mark.parametrize("bits", PACKABLE_BITS)
@pytest.mark.parametrize("num_rows, num_codes", [(16, 32), (5, 13)])
def test_memory_order_does_not_matter(bits, num_rows, num_codes):
    codes = every_code(bits, num_rows, num_codes, 1)
    transposed = codes.T.contiguous().T
    strided = torch.stack([codes, codes], dim=-1)[..., 0]
    assert not transposed.is_contiguous() and not strided.is_contiguous()
    packed = pack(codes, bits)
    assert torch.equal(pack(transposed, bits), packed)
    assert torch.equal(pack(strided, bits), packed)
    assert torch.equal(unpack(packed.T.contiguous().T, bits, num_codes), codes)


def test_packing_does_not_change_its_input():
    codes = every_code(4, 2, 8, 0)
    before = codes.clone()
    pack(codes, 4)
    assert torch.equal(codes, before)


@pytest.mark.parametrize("bits", [1, 3, 5, 6, 7])
def test_widths_without_a_settled_layout_are_not_offered(bits):
    with pytest.raises(AssertionError, match="no settled layout"):
        pack(torch.zeros(1, 1, dtype=torch.int8), bits)


@pytest.mark.parametrize("bits", PACKABLE_BITS)
def test_a_single_word_per_row_may_have_any_stride(bits):
    codes = every_code(bits, 5, 32 // bits, 2)
    column = pack(codes, bits).reshape(1, 5).T
    assert column.stride() == (1, 5) and column.is_contiguous()  # as torch has it for one column
    assert torch.equal(unpack(column, bits, 32 // bits), codes)
