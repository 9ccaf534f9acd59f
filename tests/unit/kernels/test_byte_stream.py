"""The kernel that streams 8-bit weights, compiled without a GPU, and how products are cut."""

import re
import subprocess

import pytest
import torch

pytest.importorskip(
    "cuda.bindings", reason="cuda-bindings is not installed: it comes with CUDA builds of torch"
)
pytest.importorskip("triton", reason="triton is not installed: its disassembler reads the machine code")

from quantkit_kernels import nvrtc
from quantkit_kernels.byte_stream import (
    CAPABILITY,
    SHARED_BYTES,
    SPLIT_ROWS,
    Kind,
    defines_of,
    shape_of,
    shared_bytes_of,
    team_of,
    threads_of,
)
from tests.triton_aot import CUOBJDUMP

INT8, FP8, BF16, FP16 = torch.int8, torch.float8_e4m3fn, torch.bfloat16, torch.float16
KINDS = [
    Kind(codes, codes, BF16, in_blocks, m_tile)
    for codes, in_blocks in ((INT8, False), (FP8, False), (FP8, True))
    for m_tile in (8, 16, 32, 64)
]
WIDE = [
    Kind(codes, inputs, inputs, False, m_tile)
    for codes in (INT8, FP8)
    for inputs in (BF16, FP16)
    for m_tile in (8, 16, 32, 64)
]


def machine_code(folder, defines) -> str:
    path = folder / "byte_stream.cubin"
    path.write_bytes(nvrtc.compile_cubin("byte_stream.cu", "byte_stream", defines, CAPABILITY))
    return subprocess.run([CUOBJDUMP, "--dump-sass", path], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    ("kind", "n"),
    [(KINDS[3], 6144), (KINDS[7], 4096), (KINDS[7], 28672), (KINDS[11], 6144), (KINDS[11], 28672)],
)
def test_tensor_cores_read_what_tensor_maps_bring(kind, n, tmp_path):
    """With the most rows, whose sums take the most registers."""
    sass = machine_code(tmp_path, defines_of(kind, shape_of(kind, n, 132)))
    product = "IGMMA.64x64x32.S8.S8" if kind.codes == INT8 else "QGMMA.64x64x32.F32.E4M3.E4M3"
    assert set(re.findall(r"\b\w*MMA\.\S+", sass)) == {product}
    assert "UTMALDG.2D" in sass and "LDGSTS" not in sass
    assert not re.search(r"\b(LDL|STL)\b", sass), "registers spilled"


@pytest.mark.parametrize(
    ("kind", "n"), [(WIDE[3], 4096), (WIDE[8], 6144), (WIDE[11], 28672), (WIDE[12], 4096), (WIDE[14], 6144)]
)
def test_weights_become_16_bits_in_registers(kind, n, tmp_path):
    """From shared memory to a product in registers: four words each, whose conversion no product waits for."""
    shape = shape_of(kind, n, 132)
    sass = machine_code(tmp_path, defines_of(kind, shape))
    products = re.findall(r"HGMMA\.64x(\d+)x16\.F32(\S*) R\d+, (R\d+), gdesc\[UR\d+\], R\d+(, gsb0)? ;", sass)
    assert products and len(products) == len(re.findall(r"\w*MMA\.\d", sass))
    assert {dtype for _, dtype, *_ in products} == {".BF16" if kind.inputs == BF16 else ""}
    assert {int(width) for width, *_ in products} == {kind.m_tile * (2 if shape.rows <= SPLIT_ROWS else 1)}
    assert sum(bool(ends) for *_, ends in products) <= len(products) / 2, "products wait for each other"
    between = sass[sass.index("HGMMA") : sass.rindex("HGMMA")]
    assert not re.search(r"\bST[SG]\b", between)
    assert between.count("LDS") <= 4 * len(products)
    assert not re.search(r"\b(LDL|STL)\b", sass), "registers spilled"


@pytest.mark.parametrize("kind", KINDS + WIDE)
def test_every_weight_fits(kind):
    for n in (1, 16, 33, 200, 1024, 4096, 5120, 6144, 10240, 11008, 13824, 28672, 57344, 151936):
        for multiprocessors in (114, 132):
            shape = shape_of(kind, n, multiprocessors)
            assert shape.w_stages >= 2 and shared_bytes_of(kind, shape) <= SHARED_BYTES
            assert shape.rows % 16 == 0 and 16 <= shape.rows <= 256
            assert shape.boxes % shape.x_boxes == 0
            assert shape.x_boxes % (shape.k_groups * -(-team_of(kind, shape)[1] // 2)) == 0
            assert threads_of(kind, shape) <= 1024


def test_multiprocessors_have_equal_shares():
    kind = KINDS[0]
    for n in (4096, 6144, 28672, 8192, 10240, 57344):
        tiles = -(-n // shape_of(kind, n, 132).rows)
        assert tiles / (-(-tiles // 132) * 132) > 0.9
