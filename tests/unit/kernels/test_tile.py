"""The kernel for tens to hundreds of rows, compiled without a GPU: weights go from memory to the tensor cores in registers."""

import re
import subprocess

import pytest
import torch

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed: it comes with CUDA builds of torch")
pytest.importorskip("triton", reason="triton is not installed: its disassembler reads the machine code")

from quantkit_kernels import nvrtc
from quantkit_kernels.skinny import StripWeight
from quantkit_kernels.tile import CAPABILITY, Tiling, defines_of
from tests.triton_aot import CUOBJDUMP

TILINGS = (
    Tiling(32, 2, 1),
    Tiling(64, 1, 1, 2),
    Tiling(64, 2, 8),
    Tiling(128, 2, 1),
    Tiling(128, 2, 1, 1, 2),
    Tiling(192, 1, 1),
    Tiling(256, 1, 1),
)


def stand_in(*, group: int, asymmetric: bool, scale: torch.dtype = torch.bfloat16) -> StripWeight:
    """A weight of which only dtypes and layout are read."""
    zero_point = torch.empty(1, 1, 16, dtype=torch.int8) if asymmetric else None
    strips = torch.empty(1, 1, 16, dtype=scale) if group else torch.empty(16)
    return StripWeight(torch.empty(1, dtype=torch.int32), strips, zero_point, None, (16, 128), 4, group)


def machine_code(folder, weight: StripWeight, dtype: torch.dtype, tiling: Tiling) -> str:
    defines = defines_of(weight, dtype, tiling)
    path = folder / "tile.cubin"
    path.write_bytes(nvrtc.compile_cubin("tile.cu", "tile", defines, CAPABILITY))
    return subprocess.run([CUOBJDUMP, "--dump-sass", path], check=True, capture_output=True, text=True).stdout


def check(sass: str, tiling: Tiling) -> None:
    assert len(re.findall(r"\bHGMMA\.64x\d+x16\.F32", sass)) == 8 * tiling.halves
    assert not re.search(r"\b(LDL|STL)\b", sass), "registers spilled"
    assert len(re.findall(r"\bSTS\b", sass)) == tiling.halves * tiling.m_tile // 2, "only sums go to shared memory"
    assert len(re.findall(r"DEPBAR\.LE gsb0, 0x0", sass)) == 1, "products wait for each other"


@pytest.mark.parametrize("tiling", TILINGS)
def test_products_overlap_and_weights_stay_in_registers(tiling, tmp_path):
    check(machine_code(tmp_path, stand_in(group=128, asymmetric=False), torch.bfloat16, tiling), tiling)


@pytest.mark.parametrize("tiling", [Tiling(64, 1, 1, 2), Tiling(128, 2, 1), Tiling(256, 1, 1)])
@pytest.mark.parametrize(("group", "asymmetric"), [(0, False), (32, True), (64, True)])
def test_every_granularity_stays_in_registers(group, asymmetric, tiling, tmp_path):
    weight = stand_in(group=group, asymmetric=asymmetric, scale=torch.float32)
    check(machine_code(tmp_path, weight, torch.float16, tiling), tiling)


def test_rows_that_start_anywhere_are_read(tmp_path):
    for pairs in (0, 1):
        nvrtc.compile_cubin("tile_x.cu", "tile_x", (("M_TILE", 64), ("PAIRS", pairs)), CAPABILITY)
