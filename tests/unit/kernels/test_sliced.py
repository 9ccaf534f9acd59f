"""The kernel that writes rows of a weight in 16 bits, compiled for every architecture without a GPU."""

import subprocess

import pytest

pytest.importorskip(
    "cuda.bindings", reason="cuda-bindings is not installed: it comes with CUDA builds of torch"
)
pytest.importorskip("triton", reason="triton is not installed: its disassembler reads the machine code")

from quantkit_kernels import nvrtc
from quantkit_kernels.sliced import MAX_GRID_ROWS, ROW_STEP, SLICE_BYTES, rows_of_slice
from tests.triton_aot import CAPABILITIES, CUOBJDUMP

FORMATS = [(4, 0, 128, 0, 2), (4, 0, 32, 1, 4), (8, 1, 0, 0, 4), (8, 0, 64, 1, 3)]
NAMES = ("W_BITS", "IS_E4M3", "GROUP", "ZERO", "SCALE_KIND", "OUT_KIND")


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_it_compiles_and_stays_in_registers(capability, tmp_path):
    for i, numbers in enumerate(FORMATS):
        defines = tuple(zip(NAMES, (*numbers, 2 + i % 2), strict=True))
        cubin = nvrtc.compile_cubin("dequantize.cu", "dequantize", defines, divmod(capability, 10))
        path = tmp_path / "dequantize.cubin"
        path.write_bytes(cubin)
        sass = subprocess.run(
            [CUOBJDUMP, "--dump-sass", path], check=True, capture_output=True, text=True
        ).stdout
        assert "STG.E.128" in sass
        assert "LDL" not in sass and "STL" not in sass


@pytest.mark.parametrize("k", [1, 64, 4096, 14336, 1 << 20])
def test_a_slice_is_whole_tiles_and_fits_if_one_tile_does(k):
    rows = rows_of_slice(k)
    assert rows % ROW_STEP == 0
    assert rows == ROW_STEP or rows * k * 2 <= SLICE_BYTES
    assert rows <= MAX_GRID_ROWS
