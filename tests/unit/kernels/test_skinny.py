"""The kernel for few rows, compiled without a GPU, and the layouts that it reads."""

import itertools
import re
import subprocess

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantkit.numerics.affine import dequantize
from quantkit_kernels.repack import from_fragments, from_strips, to_fragments, to_strips
from quantkit_kernels.strip_weight import dense, prepare, prepare_dense
from quantkit_kernels.weight import LinearWeight

SIZES = st.tuples(st.integers(1, 70), st.integers(1, 300))


@given(size=SIZES, seed=st.integers(0, 99))
def test_fragments_round_trip(size, seed):
    codes = torch.randint(-8, 8, size, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
    packed = to_fragments(codes)
    assert packed.shape == (-(-size[0] // 16), -(-size[1] // 64), 32, 4)
    assert torch.equal(from_fragments(packed, *size), codes)


def test_a_fragment_holds_what_the_drawing_says():
    codes = torch.randint(-8, 8, (16, 64), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    packed = to_fragments(codes)
    for lane in range(32):
        g, t = lane // 4, lane % 4
        for word in range(4):
            c = 32 * (word // 2) + 8 * t + 4 * (word % 2)
            places = [(g, c), (g + 8, c), (g, c + 2), (g + 8, c + 2)]
            places += [(row, column + 1) for row, column in places]
            for nibble, (row, column) in enumerate(places):
                found = (int(packed[0, 0, lane, word]) >> (4 * nibble)) & 15
                assert found == int(codes[row, column]) + 8


@given(size=SIZES, rows=st.integers(1, 40), seed=st.integers(0, 99))
def test_strips_round_trip(size, rows, seed):
    num_rows, num_groups = size
    values = torch.rand(-(-num_rows // rows), num_groups, generator=torch.Generator().manual_seed(seed))
    strips = to_strips(values, (rows, 1), num_rows)
    assert torch.equal(from_strips(strips, num_rows), values.repeat_interleave(rows, 0)[:num_rows])


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("group", [32, 64, 128, 200])
def test_a_laid_out_int4_weight_has_the_values_of_the_formula(group, asymmetric):
    draw = torch.Generator().manual_seed(group)
    codes = torch.randint(-8, 8, (33, 200), dtype=torch.int8, generator=draw)
    scale = torch.rand(33, -(-200 // group), generator=draw).to(torch.bfloat16)
    zero = torch.randint(-8, 8, scale.shape, dtype=torch.int8, generator=draw) if asymmetric else None
    weight = prepare(LinearWeight(codes, scale, zero, (1, group), 4))
    expected = dequantize(
        codes.float(),
        scale.float().repeat_interleave(group, 1)[:, :200],
        None if zero is None else zero.float().repeat_interleave(group, 1)[:, :200],
    )
    assert torch.equal(dense(weight, torch.float32), expected)


@pytest.mark.parametrize("tile", [(1, 77), (40, 77), (1, 32), (16, 32)])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_laid_out_8_bit_weight_has_the_values_of_the_formula(dtype, tile):
    draw = torch.Generator().manual_seed(1)
    codes = (torch.randn(40, 77, generator=draw) * 40).clamp(-127, 127).to(dtype)
    scale = torch.rand(-(-40 // tile[0]), -(-77 // tile[1]), generator=draw)
    weight = prepare(LinearWeight(codes, scale, None, tile, 8), with_row_sum=True)
    spread = scale.repeat_interleave(tile[0], 0)[:40].repeat_interleave(tile[1], 1)[:, :77]
    assert torch.equal(dense(weight, torch.float32), codes.float() * spread)
    assert weight.row_sum is not None
    assert torch.allclose(weight.row_sum, (codes.double() * spread).sum(1).float(), rtol=1e-5, atol=1e-4)
    assert weight.stored.stride(0) % 16 == 0, "bulk copies start at multiples of 16 bytes"


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [
        (0.3203125, torch.bfloat16),
        (1e30, torch.float32),
        (1311 / 4096, torch.float16),
        (0.3, torch.float32),
        (-255, torch.bfloat16),
        (-256, torch.float32),
    ],
)
def test_scales_of_groups_stay_exact_and_are_small_in_16_bits(scale, dtype):
    scales = torch.full((16, 2), 0.125)
    scales[3, 1] = scale
    weight = prepare(LinearWeight(torch.ones(16, 64, dtype=torch.int8), scales, None, (1, 32), 8))
    assert weight.scale is not None
    assert weight.scale.dtype == dtype
    assert torch.equal(from_strips(weight.scale, 16).float(), scales)


def test_float_codes_have_no_zero_points():
    codes, scale = torch.ones(16, 64).to(torch.float8_e4m3fn), torch.ones(16, 2)
    weight = LinearWeight(codes, scale, torch.zeros(16, 2, dtype=torch.int8), (1, 32), 8)
    with pytest.raises(AssertionError, match=r"codes in torch\.float8_e4m3fn have no zero points"):
        prepare(weight)


def test_rows_of_16_bits_stay_where_they_are_if_they_can():
    aligned, ragged = torch.rand(5, 64).bfloat16(), torch.rand(5, 61).bfloat16()
    assert prepare_dense(aligned).stored.data_ptr() == aligned.data_ptr()
    assert torch.equal(dense(prepare_dense(ragged), torch.bfloat16), ragged)
    assert prepare_dense(ragged).stored.stride(0) % 8 == 0


# ---- machine code ----

INT4 = {"stored_dtype": torch.int32, "bits": 4, "group_size": 128}
INT8 = {"stored_dtype": torch.int8, "bits": 8, "group_size": 0}
FP8 = {"stored_dtype": torch.float8_e4m3fn, "bits": 8, "group_size": 0}
BF16 = {"stored_dtype": torch.bfloat16, "bits": 16, "group_size": 0}


def machine_code(folder, capability, **what) -> str:
    pytest.importorskip("cuda.bindings", reason="cuda-bindings comes with CUDA builds of torch")
    pytest.importorskip("triton", reason="triton's disassembler reads the machine code")
    from quantkit_kernels import nvrtc
    from quantkit_kernels.skinny import Kind, _shape, _stages, defines_of
    from tests.triton_aot import CUOBJDUMP

    scale = torch.bfloat16 if what["group_size"] else torch.float32
    usual = {"scale_dtype": scale, "has_zero_point": False, "x_dtype": torch.bfloat16, "tiles": 1}
    kind = Kind(**usual | {"out_dtype": torch.bfloat16, "is_vector": True} | what)
    shape = _shape(kind)
    defines = defines_of(kind, shape, _stages(kind, shape)[0])
    path = folder / "skinny.cubin"
    path.write_bytes(nvrtc.compile_cubin("skinny.cu", "skinny", defines, capability))
    return subprocess.run([CUOBJDUMP, "--dump-sass", path], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("weight", [INT4, INT8, FP8, BF16], ids=["int4", "int8", "fp8", "bf16"])
@pytest.mark.parametrize("tiles", [1, 2])
def test_weights_go_from_shared_memory_to_the_tensor_core_in_registers(weight, tiles, capability, tmp_path):
    sass = machine_code(tmp_path, capability, tiles=tiles, **weight)
    assert "HMMA.16816.F32.BF16" in sass
    assert "UBLKCP" in sass, "weights come by bulk copies"
    assert not re.search(r"\b(LDL|STL)\b", sass), "registers spilled"


def test_every_kind_fits_where_a_block_has_99_kb():
    pytest.importorskip("triton", reason="triton is not installed: the kernels ask for it")
    from quantkit_kernels.skinny import Kind, _fitting, _shape, _shared_bytes

    usual = {"x_dtype": torch.bfloat16, "out_dtype": torch.bfloat16, "is_vector": True}
    for weight in (INT4, INT8, FP8, BF16, INT4 | {"group_size": 32}, INT8 | {"group_size": 32}):
        for tiles, has_zero in itertools.product((1, 2, 4), (False, True)):
            has_zero &= weight["group_size"] > 0
            for x_dtype in (torch.bfloat16, torch.int8):
                how = {"scale_dtype": torch.float32, "has_zero_point": has_zero, "tiles": tiles}
                kind = Kind(**usual | how | weight | {"x_dtype": x_dtype})
                assert _shared_bytes(kind, _fitting(kind, 101376)) <= 101376
                assert _fitting(kind, 232448) == _shape(kind)


def test_rows_of_8_bits_that_bulk_copies_cannot_read_are_copied():
    codes = torch.randint(-128, 128, (40, 96), dtype=torch.int8)
    assert prepare(LinearWeight(codes[:, :64], torch.ones(40, 1), None, (1, 64), 8)).stored.stride() == (
        96,
        1,
    )
    moved = codes[:, 8:72]
    stored = prepare(LinearWeight(moved, torch.ones(40, 1), None, (1, 64), 8)).stored
    assert torch.equal(stored, moved) and stored.data_ptr() % 16 == 0


@pytest.mark.parametrize("weight", [INT4, INT8], ids=["int4", "int8"])
def test_int8_inputs_are_multiplied_as_integers(weight, tmp_path):
    sass = machine_code(tmp_path, (9, 0), x_dtype=torch.int8, **weight)
    assert "IMMA.16832.S8.S8" in sass and "HMMA" not in sass
    assert not re.search(r"\b(LDL|STL)\b", sass)


@pytest.mark.parametrize(
    "weight", [INT4 | {"group_size": 32, "has_zero_point": True}, FP8 | {"group_size": 128}]
)
def test_fp8_inputs_are_multiplied_as_fp16(weight, tmp_path):
    sass = machine_code(tmp_path, (9, 0), x_dtype=torch.float8_e4m3fn, **weight)
    assert "HMMA.16816.F32 " in sass and "F2FP.F16.E4M3" in sass
    assert not re.search(r"\b(LDL|STL)\b", sass)
