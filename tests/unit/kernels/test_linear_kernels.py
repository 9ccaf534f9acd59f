"""Kernels against float64: what they compute is x · wᵀ of the dequantized weight, within what the dtype allows."""

import pytest
import torch

from quantkit_kernels import dequantize, int4pack, int8_int8, int8pack
from quantkit_kernels.catalog import choose_float, choose_int8
from quantkit_kernels.float8 import REBIAS, decode_shifted, has_nan
from quantkit_kernels.weight import LinearWeight

TILES = {"tensor": None, "channel": (1, 0), "group": (1, 32), "block": (128, 128)}


def make_weight(bits, rows, cols, tile, *, asymmetric=False, seed=0):
    random = torch.Generator().manual_seed(seed)
    tile = (rows, cols) if tile is None else (tile[0], tile[1] or cols)
    grid = (-(-rows // tile[0]), -(-cols // tile[1]))
    if bits == "fp8":
        codes, bits = torch.randn(rows, cols, generator=random).to(torch.float8_e4m3fn), 8
    else:
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
        codes = torch.randint(low, high, (rows, cols), generator=random).to(torch.int8)
    scale = (0.01 + 0.01 * torch.rand(grid, generator=random)).to(torch.bfloat16)
    zero_point = None
    if asymmetric:
        zero_point = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), grid, generator=random).to(torch.int8)
    return LinearWeight(codes, scale, zero_point, tile, bits)


def dense(weight):
    """The dequantized weight, float64, by the definition."""
    rows, cols = weight.codes_NK.shape
    row = torch.arange(rows)[:, None] // weight.tile[0]
    col = torch.arange(cols)[None, :] // weight.tile[1]
    codes = weight.codes_NK.double()
    if weight.zero_point_RG is not None:
        codes = codes - weight.zero_point_RG[row, col].double()
    return codes * weight.scale_RG[row, col].double()


def assert_close(y, x, w, dtype):
    """Within rounding: of each weight and of the result to dtype, of K float32 additions; measured on Σ|x·w|."""
    exact = x.double() @ w.T
    size = x.double().abs() @ w.abs().T
    bound = size * (torch.finfo(dtype).eps + x.shape[1] * torch.finfo(torch.float32).eps)
    excess = ((y.double() - exact).abs() / bound.clamp(min=1e-30)).max()
    assert y.dtype == dtype
    assert excess <= 1, f"error is {excess:.2f} times the bound"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(
    ("bits", "asymmetric"),
    [(2, False), (2, True), (4, False), (4, True), (8, False), (8, True), ("fp8", False)],
)
def test_dequantize_takes_everything(bits, asymmetric, tile, dtype):
    for rows, cols, m in ((1, 32, 1), (130, 160, 3), (17, 288, 33)):
        weight = make_weight(bits, rows, cols, TILES[tile], asymmetric=asymmetric)
        x = torch.randn(m, cols, generator=torch.Generator().manual_seed(m)).to(dtype)
        assert_close(dequantize.run(x, dequantize.prepare(weight, dtype)), x, dense(weight), dtype)


@pytest.mark.parametrize("bits", [2, 4, 8, "fp8"])
def test_dequantize_takes_odd_widths_and_chunks(bits, monkeypatch):
    monkeypatch.setattr(dequantize, "CHUNK_ELEMENTS", 100)  # a few rows at a time, the last chunk smaller
    for tile in (None, (1, 0), (4, 8)):
        weight = make_weight(bits, 13, 37, tile)
        x = torch.randn(5, 37)
        assert_close(
            dequantize.run(x, dequantize.prepare(weight, torch.float32)), x, dense(weight), torch.float32
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 4, 8, "fp8"])
def test_dense_rows_are_the_rounded_products(bits, dtype):
    weight = make_weight(bits, 12, 64, (1, 32), asymmetric=bits != "fp8")
    rows = dequantize.dense_rows(dequantize.prepare(weight, dtype), 3, 9)
    assert torch.equal(rows, dense(weight).to(dtype)[3:9])


def test_a_float32_scale_is_not_rounded_to_the_activations_dtype():
    weight = make_weight(8, 4, 32, (1, 0))._replace(scale_RG=torch.full((4, 1), 0.0123456))
    rows = dequantize.dense_rows(dequantize.prepare(weight, torch.bfloat16), 0, 4)
    assert torch.equal(rows, dense(weight).to(torch.bfloat16))


def test_packed_codes_take_bits_over_eight_bytes_each():
    for bits, size in ((2, 10), (4, 19), (8, 37)):
        operand = dequantize.prepare(make_weight(bits, 3, 37, (1, 0)), torch.float32)
        assert operand.stored.nbytes == 3 * size


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("rows", [16, 17, 100])
def test_int4pack(rows, asymmetric, group):
    weight = make_weight(4, rows, 256, (1, group), asymmetric=asymmetric)
    assert int4pack.supports(weight, torch.bfloat16)
    operand = int4pack.prepare(weight, torch.bfloat16)
    for m in (1, 3, 17):
        x = torch.randn(m, 256).to(torch.bfloat16)
        assert_close(int4pack.run(x, operand), x, dense(weight), torch.bfloat16)


def test_int4pack_keeps_a_zero_point_whose_offset_is_no_bf16_number():
    codes = torch.full((16, 32), 7, dtype=torch.int8)
    scale = torch.full((16, 1), 1.0078125, dtype=torch.bfloat16)  # 8 significant bits
    weight = LinearWeight(codes, scale, torch.full((16, 1), 7, dtype=torch.int8), (1, 32), 4)
    y = int4pack.run(torch.ones(1, 32, dtype=torch.bfloat16), int4pack.prepare(weight, torch.bfloat16))
    assert torch.equal(y, torch.zeros(1, 16, dtype=torch.bfloat16))  # (7 − 7) · scale


@pytest.mark.parametrize("tile", ["tensor", "channel"])
def test_int8pack(tile):
    for rows, cols in ((33, 16), (1, 80), (7, 304)):
        weight = make_weight(8, rows, cols, TILES[tile])
        operand = int8pack.prepare(weight, torch.bfloat16)
        for m in (1, 5):
            x = torch.randn(m, cols).to(torch.bfloat16)
            assert_close(int8pack.run(x, operand), x, dense(weight), torch.bfloat16)


def test_int8pack_leaves_widths_that_its_operator_overruns():
    for cols in (70, 24, 15):
        assert not int8pack.supports(make_weight(8, 16, cols, (1, 0)), torch.bfloat16)


@pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="integer products are exact only with VNNI")
@pytest.mark.parametrize("tile", ["tensor", "channel"])
@pytest.mark.parametrize("zero_point", [None, -7, 127])
def test_int8_times_int8_is_exact_before_the_scales(tile, zero_point):
    weight = make_weight(8, 33, 1001, TILES[tile])
    operand = int8_int8.prepare(weight, torch.bfloat16)
    for m in (1, 37):
        codes = torch.randint(-128, 128, (m, 1001), generator=torch.Generator().manual_seed(m)).to(torch.int8)
        zero = None if zero_point is None else torch.tensor([zero_point], dtype=torch.int8)
        y = int8_int8.run(codes, torch.ones(1), zero, operand)
        integers = (codes.long() - (zero_point or 0)) @ weight.codes_NK.long().T
        expected = integers.float() * weight.scale_RG.float().expand(33, 1)[:, 0]
        assert torch.equal(y, expected)


@pytest.mark.parametrize("num_cols", [int8_int8.MAX_COLS - 1, int8_int8.MAX_COLS])
def test_the_largest_codes_of_as_many_columns_as_are_taken(num_cols, monkeypatch):
    codes = torch.full((2, num_cols), -128, dtype=torch.int8)
    weight = LinearWeight(codes, torch.ones(2, 1), None, (1, num_cols), 8)
    has_vnni = torch.cpu._is_vnni_supported()
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    is_taken = int8_int8.supports(weight, torch.bfloat16)
    assert is_taken == (num_cols < int8_int8.MAX_COLS)
    assert not is_taken or 255 * 128 * num_cols < 2**31
    if is_taken and has_vnni:
        zero = torch.tensor([127], dtype=torch.int8)
        y = int8_int8.run(codes, torch.ones(1), zero, int8_int8.prepare(weight, torch.bfloat16))
        assert torch.equal(y, torch.full_like(y, 255 * 128 * num_cols))


@pytest.mark.parametrize(
    ("bits", "tile", "asymmetric", "dtype", "names"),
    [
        (4, (1, 64), False, torch.bfloat16, ["int4pack", "dequantize"]),
        (4, (1, 64), True, torch.bfloat16, ["int4pack", "dequantize"]),
        (4, (1, 64), False, torch.float32, ["dequantize"]),
        (4, (1, 0), False, torch.bfloat16, ["dequantize"]),
        (2, (1, 64), False, torch.bfloat16, ["dequantize"]),
        (8, (1, 0), False, torch.bfloat16, ["int8pack", "dequantize"]),
        (8, (1, 0), True, torch.bfloat16, ["dequantize"]),
        (8, (1, 64), False, torch.bfloat16, ["dequantize"]),
        ("fp8", (1, 0), False, torch.bfloat16, ["dequantize"]),
    ],
)
def test_the_catalog_chooses(bits, tile, asymmetric, dtype, names):
    weight = make_weight(bits, 16, 192, tile, asymmetric=asymmetric)
    kernels = choose_float(weight, dtype)
    assert [kernel.name for kernel in kernels] == names
    assert [kernel.max_rows is None for kernel in kernels] == [name == "dequantize" for name in names]


def test_a_scale_that_bf16_cannot_hold_is_left_to_dequantization():
    for bits, tile in ((4, (1, 32)), (8, (1, 0))):
        weight = make_weight(bits, 16, 64, tile)
        weight = weight._replace(scale_RG=weight.scale_RG.float() * 1.001)
        assert [kernel.name for kernel in choose_float(weight, torch.bfloat16)] == ["dequantize"]


def test_integer_products_are_for_16_bit_activations_and_int8_rows():
    weight = make_weight(8, 16, 64, (1, 0))
    chosen = choose_int8(weight, torch.bfloat16)
    assert (chosen is not None) == torch.cpu._is_vnni_supported()
    assert choose_int8(weight, torch.float32) is None
    assert choose_int8(make_weight(8, 16, 64, (1, 32)), torch.bfloat16) is None
    assert choose_int8(make_weight(4, 16, 64, (1, 0)), torch.bfloat16) is None
    assert choose_int8(make_weight("fp8", 16, 64, (1, 0)), torch.bfloat16) is None


def test_every_fp8_code_is_decoded():
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F].view(torch.float8_e4m3fn)
    assert len(codes) == 254
    assert torch.equal(decode_shifted(codes) * REBIAS, codes.float())
    assert not has_nan(codes)


@pytest.mark.parametrize("nan", [0x7F, 0xFF])
def test_fp8_nan_is_found(nan):
    assert has_nan(torch.tensor([0, nan, 1], dtype=torch.uint8).view(torch.float8_e4m3fn))
