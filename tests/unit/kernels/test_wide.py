"""The kernel for hundreds to thousands of rows, compiled without a GPU: weights stay in registers, products overlap."""

import re
import subprocess

import pytest
import torch

pytest.importorskip(
    "cuda.bindings", reason="cuda-bindings is not installed: it comes with CUDA builds of torch"
)
pytest.importorskip("triton", reason="triton is not installed: its disassembler reads the machine code")

from quantkit_kernels import nvrtc
from quantkit_kernels.strip_weight import StripWeight
from quantkit_kernels.wide import KINDS, X_SIZE
from quantkit_kernels.wide_codes import TILING
from quantkit_kernels.wide_launch import (
    CAPABILITY,
    MIN_STAGES,
    SHARED_BYTES,
    Tiling,
    defines_of,
    fastest,
    shared_bytes_of,
    shares,
    stages_of,
)
from tests.triton_aot import CUOBJDUMP
from tests.unit.kernels.test_tile import stand_in


def machine_code(folder, file: str, defines: nvrtc.Defines) -> str:
    path = folder / "wide.cubin"
    path.write_bytes(nvrtc.compile_cubin(f"{file}.cu", file, defines, CAPABILITY))
    return subprocess.run([CUOBJDUMP, "--dump-sass", path], check=True, capture_output=True, text=True).stdout


def check(folder, weight: StripWeight, dtype: torch.dtype, tiling: Tiling) -> None:
    assert shared_bytes_of(weight, tiling, X_SIZE) <= SHARED_BYTES
    sass = machine_code(folder, "wide", defines_of(weight, dtype, tiling, X_SIZE))
    loops = 2 if tiling.warpgroups == 2 else 1  # whole tiles, and halves
    assert len(re.findall(r"\bHGMMA\.64x\d+x16\.F32", sass)) == 4 * loops
    assert not re.search(r"\b(LDL|STL)\b", sass), "registers spilled"
    assert len(re.findall(r"\bSTS\b", sass)) == (loops - 1) * tiling.m_tile // 2, (
        "of half a tile's sums alone"
    )
    assert len(re.findall(r"DEPBAR\.LE gsb0, 0x0", sass)) == loops, "products wait for each other"
    assert "UTMALDG.2D" in sass and "UTMASTG.2D" in sass


@pytest.mark.parametrize("tiling", [kind.tiling for kind in KINDS])
def test_products_overlap_and_weights_stay_in_registers(tiling, tmp_path):
    check(tmp_path, stand_in(group=128, asymmetric=False), torch.bfloat16, tiling)


@pytest.mark.parametrize("codes", [torch.int32, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("group", [0, 32])
def test_every_weight_stays_in_registers(group, codes, tmp_path):
    asymmetric = group > 0 and codes != torch.float8_e4m3fn
    weight = stand_in(group=group, asymmetric=asymmetric, scale=torch.float32, codes=codes)
    tiling = fastest(KINDS, 256, weight, X_SIZE, 132)
    assert stages_of(weight, tiling, X_SIZE) >= MIN_STAGES
    check(tmp_path, weight, torch.float16, tiling)


@pytest.mark.parametrize("is_int8", [True, False])
@pytest.mark.parametrize("group", [0, 32, 64, 128])
def test_codes_are_multiplied_as_codes(group, is_int8, tmp_path):
    weight = stand_in(group=group, asymmetric=False)
    assert shared_bytes_of(weight, TILING, 1) <= SHARED_BYTES
    defines = (*defines_of(weight, torch.bfloat16, TILING, 1), ("IS_INT8", int(is_int8)), ("BIAS_KIND", 2))
    sass = machine_code(tmp_path, "wide_codes", defines)
    assert len(re.findall(r"\b[IQ]GMMA\.64x128x32", sass)) == 8
    assert ("IGMMA" in sass) == is_int8
    assert not re.search(r"\b(LDL|STL)\b", sass), "registers spilled"


@pytest.mark.parametrize("num_tiles", [1, 5, 65, 66, 67, 131, 132, 133, 198, 199, 448, 1792])
def test_a_last_round_is_halved_where_nobody_gets_two_halves(num_tiles):
    whole, halves = shares(num_tiles, Tiling(), 132)
    assert 2 * whole + halves == 2 * num_tiles
    assert 0 <= halves <= 132
    assert whole % 132 == 0 or halves == 0


def test_the_fastest_of_what_was_measured():
    """On an H100: three warpgroups leave fewer multiprocessors idle with 512 rows and 6144 outputs."""
    weight = stand_in(group=128, asymmetric=False)
    assert fastest(KINDS, 512, weight._replace(shape=(6144, 4096)), X_SIZE, 132) == Tiling(128, 3)
    assert fastest(KINDS, 512, weight._replace(shape=(28672, 4096)), X_SIZE, 132) == Tiling(256)
    assert fastest(KINDS, 256, weight._replace(shape=(4096, 4096)), X_SIZE, 132) == Tiling(128)
