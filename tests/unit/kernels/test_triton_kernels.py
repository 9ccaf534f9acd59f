"""Triton kernels without a GPU: they compile for every architecture, stay in registers, and compute in float32."""

import pytest

pytest.importorskip("triton", reason="triton is not installed: it comes with CUDA builds of torch")

from quantkit_kernels import gptq_block_kernel, moments_kernel, scale_search_kernel
from tests.triton_aot import CAPABILITIES, Resources, compile_for

HOPPER = 90


def compile_gptq(
    capability: int, *, is_float8: bool = False, asymmetric: bool = False, weight: str = "*bf16"
) -> Resources:
    pointers = {"w": weight, "scale": "*bf16", "zero_point": "*i8", "group": "*i64", "codes": "*i8"}
    pointers |= dict.fromkeys(("carried", "factor", "lost", "loss"), "*fp32")
    strides = ("batch_w", "stride_w", "batch_carried", "stride_carried", "batch_scale", "stride_scale")
    numbers = dict.fromkeys(("num_rows", *strides), "i32") | {"qmin": "fp32", "qmax": "fp32"}
    constants = {"NUM_COLUMNS": 128, "COLUMNS": 128, "ROWS": gptq_block_kernel.ROWS}
    constants |= {"IS_FLOAT8": is_float8, "HAS_ZERO_POINT": asymmetric}
    return compile_for(
        gptq_block_kernel.gptq_block_kernel,
        capability,
        pointers | numbers,
        constants,
        gptq_block_kernel.NUM_WARPS,
    )


def compile_search(capability: int, size: int, grid: str, *, with_importance: bool = True) -> Resources:
    pointers = {"tiles": "*bf16", "zero_points": "*i8"}
    pointers |= dict.fromkeys(("importance", "ratios", "steps", "scales"), "*fp32")
    numbers = {"num_tiles": "i32", "period": "i32"} | dict.fromkeys(("half_range", "qmin", "qmax"), "fp32")
    tiles, num_warps = scale_search_kernel.program_shape(size)
    constants = {"NUM_RATIOS": 6, "NUM_STEPS": 4, "NUM_ELEMENTS": size, "TILES": tiles, "SIZE": size}
    constants |= {
        "GRID": scale_search_kernel.GRIDS.index(grid),
        "ROUND_TO": 2,
        "HAS_IMPORTANCE": with_importance,
    }
    return compile_for(
        scale_search_kernel.scale_search_kernel, capability, pointers | numbers, constants, num_warps
    )


def compile_moments(capability: int) -> Resources:
    types = {"x": "*bf16", "sums": "*fp32", "num_tokens": "i32", "num_features": "i32", "stride_x": "i32"}
    constants = {
        "TOKENS": moments_kernel.TOKENS,
        "COLUMNS": moments_kernel.COLUMNS,
        "ROWS": moments_kernel.ROWS,
    }
    return compile_for(moments_kernel.moments_kernel, capability, types, constants, moments_kernel.NUM_WARPS)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_compile_and_stay_in_registers(capability):
    for resources in (
        compile_gptq(capability),
        compile_search(capability, 128, "either sign"),
        compile_moments(capability),
    ):
        assert resources.stack == 0
        assert resources.registers <= 168  # three programs of four warps on a multiprocessor
        assert "LDL" not in resources.sass and "STL" not in resources.sass


@pytest.mark.parametrize("weight", ["*bf16", "*fp32"])
@pytest.mark.parametrize(("is_float8", "asymmetric"), [(True, False), (False, True)])
def test_every_grid_of_the_gptq_kernel_stays_in_registers(is_float8, asymmetric, weight):
    assert compile_gptq(HOPPER, is_float8=is_float8, asymmetric=asymmetric, weight=weight).stack == 0


@pytest.mark.parametrize("grid", scale_search_kernel.GRIDS)
def test_whole_channels_are_searched_in_registers(grid):
    assert compile_search(HOPPER, 16384, grid).stack == 0
