"""Every kernel in CUDA C++ has room for every format that it is called with, at any number of rows."""

import itertools
from typing import NamedTuple

import pytest
import torch

from quantkit_kernels import byte_stream, skinny, tile, wide, wide_codes, wide_launch
from quantkit_kernels.strip_weight import StripWeight

HOPPER, NEWEST = 232448, 101376  # bytes of shared memory that a block may have, on 9.0 and on 12.0
ROWS = (1, 17, 33, 65, 97, 129, 200, 256, 512, 1000, 4096)
CODES = {torch.int32: 4, torch.int8: 8, torch.float8_e4m3fn: 8}
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


class Format(NamedTuple):
    """codes: of int32 words, INT4. group: 0: a scale per row, float32."""

    codes: torch.dtype
    group: int
    scale: torch.dtype
    has_zero_point: bool


FORMATS = [
    Format(codes, group, scale, has_zero_point)
    for codes, group, scale, has_zero_point in itertools.product(
        CODES, (0, 32, 64, 128), FLOATS, (False, True)
    )
    if (group or (scale == torch.float32 and not has_zero_point))
    and not (has_zero_point and codes == torch.float8_e4m3fn)
]


def weight_of(form: Format, n: int = 4096, k: int = 4096) -> StripWeight:
    """Without memory."""
    bits = CODES[form.codes]
    stored = (n // 16, k // 64, 32, 4) if bits == 4 else (n, k)
    strips = (n // 16, k // form.group, 16) if form.group else (n,)
    return StripWeight(
        torch.empty(stored, dtype=form.codes, device="meta"),
        torch.empty(strips, dtype=form.scale, device="meta"),
        torch.empty(strips, dtype=torch.int8, device="meta") if form.has_zero_point else None,
        None,
        (n, k),
        bits,
        form.group,
    )


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_tile_and_wide_have_room_at_any_number_of_rows(form):
    for num_rows, n in itertools.product(ROWS, (16, 4096, 28672)):
        weight = weight_of(form, n)
        tiling = tile.tiling_of(num_rows, weight, 132)
        tile.defines_of(weight, torch.bfloat16, tiling)
        assert tile.shared_bytes_of(weight, tiling) <= HOPPER // tiling.resident
        tiling = wide_launch.fastest(wide.KINDS, num_rows, weight, wide.X_SIZE, 132)
        wide_launch.defines_of(weight, torch.bfloat16, tiling, wide.X_SIZE)
        assert wide_launch.stages_of(weight, tiling, wide.X_SIZE) >= wide_launch.MIN_STAGES
        assert wide_launch.shared_bytes_of(weight, tiling, wide.X_SIZE) <= HOPPER


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_wide_codes_has_room(form):
    weight = weight_of(form)
    if wide_codes.supports(weight, torch.bfloat16):
        wide_launch.defines_of(weight, torch.bfloat16, wide_codes.TILING, 1)
        assert wide_launch.stages_of(weight, wide_codes.TILING, 1) >= wide_launch.MIN_STAGES
        assert wide_launch.shared_bytes_of(weight, wide_codes.TILING, 1) <= HOPPER


@pytest.mark.parametrize("form", [*FORMATS, Format(torch.bfloat16, 0, torch.float32, False)], ids=str)
def test_skinny_has_room_on_every_device(form):
    codes, group, scale, has_zero_point = form
    bits = CODES.get(codes, 16)
    inputs = FLOATS[:2] if bits == 16 else (*FLOATS[:2], torch.int8, torch.float8_e4m3fn)
    for x_dtype, tiles, most in itertools.product(inputs, (1, 2, 4), (HOPPER, NEWEST)):
        kind = skinny.Kind(codes, scale, has_zero_point, bits, group, x_dtype, torch.bfloat16, tiles, True)
        shape = skinny._fitting(kind, most)
        assert skinny._stages(kind, shape)[0] >= 2 and skinny._shared_bytes(kind, shape) <= most


@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn])
def test_byte_stream_has_room_for_any_number_of_outputs(codes):
    for inputs, in_blocks, num_rows in itertools.product(
        (codes, torch.bfloat16), (False, True), (1, 9, 17, 33, 64)
    ):
        if in_blocks and (codes == torch.int8 or inputs != codes):
            continue
        kind = byte_stream.Kind(codes, inputs, torch.float32, in_blocks, byte_stream.m_tile_of(num_rows))
        for n in (1, 16, 2112, 2128, 4096, 6144, 8464, 14336, 28672, 33792, 57344, 128256):
            shape = byte_stream.shape_of(kind, n, 132)
            assert shape.w_stages >= 2 and byte_stream.shared_bytes_of(kind, shape) <= HOPPER
