"""The kernel for tens to hundreds of rows, compiled without a GPU: weights stay in registers, products overlap."""

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
from quantkit_kernels.tile import CAPABILITY, KINDS, Tiling, defines_of, tiling_of
from tests.triton_aot import CUOBJDUMP

TILINGS = [Tiling(kind.m_tile, kind.halves, 1, kind.resident, kind.x_stages) for kind in KINDS]


def stand_in(
    *, group: int, asymmetric: bool, scale: torch.dtype = torch.bfloat16, codes: torch.dtype = torch.int32
) -> StripWeight:
    """A weight of which only dtypes and layout are read."""
    zero_point = torch.empty(1, 1, 16, dtype=torch.int8) if asymmetric else None
    strips = torch.empty(1, 1, 16, dtype=scale) if group else torch.empty(16)
    bits = 4 if codes == torch.int32 else 8
    return StripWeight(torch.empty(1, 128, dtype=codes), strips, zero_point, None, (16, 128), bits, group)


def machine_code(folder, weight: StripWeight, dtype: torch.dtype, tiling: Tiling) -> str:
    defines = defines_of(weight, dtype, tiling)
    path = folder / "tile.cubin"
    path.write_bytes(nvrtc.compile_cubin("tile.cu", "tile", defines, CAPABILITY))
    return subprocess.run([CUOBJDUMP, "--dump-sass", path], check=True, capture_output=True, text=True).stdout


def check(sass: str, tiling: Tiling) -> None:
    assert len(re.findall(r"\bHGMMA\.64x\d+x16\.F32", sass)) == 8 * tiling.halves
    assert not re.search(r"\b(LDL|STL)\b", sass), "registers spilled"
    assert len(re.findall(r"\bSTS\b", sass)) == tiling.halves * tiling.m_tile // 2, (
        "only sums go to shared memory"
    )
    assert len(re.findall(r"DEPBAR\.LE gsb0, 0x0", sass)) == 1, "products wait for each other"


@pytest.mark.parametrize("tiling", TILINGS)
def test_products_overlap_and_weights_stay_in_registers(tiling, tmp_path):
    check(machine_code(tmp_path, stand_in(group=128, asymmetric=False), torch.bfloat16, tiling), tiling)


@pytest.mark.parametrize("codes", [torch.int32, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("group", [0, 32])
def test_every_weight_stays_in_registers(group, codes, tmp_path):
    tiling = TILINGS[1]  # of those with the fewest registers, the one with the most sums
    asymmetric = group > 0 and codes != torch.float8_e4m3fn
    weight = stand_in(group=group, asymmetric=asymmetric, scale=torch.float32, codes=codes)
    check(machine_code(tmp_path, weight, torch.float16, tiling), tiling)


def test_rows_that_start_anywhere_are_read(tmp_path):
    for pairs in (0, 1):
        nvrtc.compile_cubin("tile_x.cu", "tile_x", (("M_TILE", 64), ("PAIRS", pairs)), CAPABILITY)


@pytest.mark.parametrize(
    "shape", [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (40, 77), (1, 1)]
)
def test_tilings_cover_every_row_and_share_no_more_than_there_is(shape):
    weight = stand_in(group=128, asymmetric=False)._replace(shape=shape)
    for num_rows in (1, 17, 33, 64, 65, 96, 97, 128, 129, 257, 1000, 4096):
        tiling = tiling_of(num_rows, weight, 132)
        assert tiling.m_tile >= min(num_rows, 128)
        assert tiling.split <= max(1, -(-shape[1] // 128) // 4)
        blocks = -(-num_rows // tiling.m_tile) * -(-shape[0] // (128 * tiling.halves)) * tiling.split
        assert tiling.split == 1 or blocks <= 132 * tiling.resident
