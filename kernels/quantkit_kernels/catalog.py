"""Which kernel multiplies which weight, by tables.

On a CPU: two tables, read from the top, first match wins. The choice is made once, when a layer is built; a layer may
hold one kernel for few rows (decode) and one for many (prefill).

On a GPU: one table of families. A family takes weights of some formats, on devices from some compute capability on, at
any number of rows; `dispatch` says by which of its routes.
"""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantkit_kernels import dequantize, int4pack, int8_int8, int8pack
from quantkit_kernels.family import Family
from quantkit_kernels.weight import LinearWeight


@dataclass(frozen=True, slots=True)
class Kernel:
    """prepare(weight, dtype) -> operand; run(x, operand) -> y. max_rows: the M up to which it is the fastest."""

    name: str
    max_rows: int | None
    supports: Callable[[LinearWeight, torch.dtype], bool]
    prepare: Callable[[LinearWeight, torch.dtype], Any]
    run: Callable[..., Tensor]


# Inputs in floating point. The limits on M are against dequantizing the same weight, measured on a 2-core
# AVX-512 CPU: 4096 x 4096, M = 16: int4pack 3.1 ms, int8pack 3.1 ms, dequantize + bf16 matmul about 6 ms.
FLOAT_INPUT = (
    Kernel("int4pack", 24, int4pack.supports, int4pack.prepare, int4pack.run),
    Kernel("int8pack", 24, int8pack.supports, int8pack.prepare, int8pack.run),
    Kernel("dequantize", None, dequantize.supports, dequantize.prepare, dequantize.run),
)

# Inputs as int8 codes with their scale: run(codes, scale, zero_point, operand).
INT8_INPUT = (Kernel("int8_int8", None, int8_int8.supports, int8_int8.prepare, int8_int8.run),)


def choose_float(weight: LinearWeight, dtype: torch.dtype) -> tuple[Kernel, ...]:
    """Kernels for a floating-point input, ordered by max_rows; the last one takes any M.

    On a GPU, in float32 alone: dequantizing, which is plain torch.
    """
    chosen: list[Kernel] = []
    for kernel in FLOAT_INPUT if _is_on_cpu(weight, dtype) else FLOAT_INPUT[-1:]:
        if kernel.supports(weight, dtype):
            chosen.append(kernel)
            if kernel.max_rows is None:
                break
    return tuple(chosen)


def choose_int8(weight: LinearWeight, dtype: torch.dtype) -> Kernel | None:
    """The kernel that takes int8 codes as input, or None where there is none for this weight."""
    if not _is_on_cpu(weight, dtype):
        return None
    return next((kernel for kernel in INT8_INPUT if kernel.supports(weight, dtype)), None)


def _is_on_cpu(weight: LinearWeight, dtype: torch.dtype) -> bool:
    device = weight.codes_NK.device.type
    is_on_cpu = device in ("cpu", "meta")
    assert is_on_cpu or dtype == torch.float32, f"weights on {device}: product.prepare finds their kernel"
    return is_on_cpu


Tile = tuple[int | None, int | None]  # rows and columns that share a scale; None: all of them
GROUPS: tuple[Tile, ...] = ((1, 128), (1, 64), (1, 32))
CHANNEL: Tile = (1, None)
TENSOR: Tile = (None, None)
BLOCK: Tile = (128, 128)
FLOATS = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuFamily:
    """The weights and inputs of a family, which is `attribute` of `module`; every route takes all of them.

    Routes are called run(x, operand); where x is codes with x_scale, float32 [M, 1], or [M, ceil(K / 128)] for weights
    in blocks, and with out_dtype. Of each field the first value is what is measured.
    """

    name: str
    module: str
    attribute: str = "FAMILY"
    bits: int
    codes: tuple[torch.dtype, ...]
    tiles: tuple[Tile, ...]
    inputs: tuple[torch.dtype, ...]
    has_zero_points: bool = False

    def load(self) -> Family:
        """Its routes; imports the kernels."""
        family = getattr(importlib.import_module(f"quantkit_kernels.{self.module}"), self.attribute)
        assert isinstance(family, Family), f"{self.module}.{self.attribute} is no family"
        return family


GPU_FAMILIES = (
    GpuFamily(
        name="w4a16",
        module="weight_only",
        attribute="W4A16",
        bits=4,
        codes=(torch.int8,),
        tiles=(*GROUPS, CHANNEL, TENSOR),
        inputs=FLOATS,
        has_zero_points=True,
    ),
    GpuFamily(
        name="w8a16",
        module="weight_only",
        attribute="W8A16",
        bits=8,
        codes=(torch.float8_e4m3fn, torch.int8),
        tiles=(CHANNEL, TENSOR, *GROUPS, BLOCK),
        inputs=FLOATS,
        has_zero_points=True,
    ),
    GpuFamily(
        name="w8a8_fp8",
        module="w8a8_fp8",
        bits=8,
        codes=(torch.float8_e4m3fn,),
        tiles=(CHANNEL, TENSOR),
        inputs=(torch.float8_e4m3fn,),
    ),
    GpuFamily(
        name="w8a8_fp8_block",
        module="w8a8_fp8",
        attribute="BLOCK_FAMILY",
        bits=8,
        codes=(torch.float8_e4m3fn,),
        tiles=(BLOCK,),
        inputs=(torch.float8_e4m3fn,),
    ),
    GpuFamily(
        name="w8a8_int8",
        module="w8a8_int8",
        bits=8,
        codes=(torch.int8,),
        tiles=(CHANNEL, TENSOR),
        inputs=(torch.int8,),
    ),
    GpuFamily(
        name="w4a8_fp8",
        module="w4a8",
        attribute="FP8_INPUT",
        bits=4,
        codes=(torch.int8,),
        tiles=(*GROUPS, CHANNEL, TENSOR),
        inputs=(torch.float8_e4m3fn,),
    ),
    GpuFamily(
        name="w4a8_int8",
        module="w4a8",
        attribute="INT8_INPUT",
        bits=4,
        codes=(torch.int8,),
        tiles=(*GROUPS, CHANNEL, TENSOR),
        inputs=(torch.int8,),
    ),
    GpuFamily(
        name="dense16",
        module="weight_only",
        attribute="DENSE16",
        bits=16,
        codes=FLOATS,
        tiles=(TENSOR,),
        inputs=FLOATS,
    ),
)


class WeightFormat(NamedTuple):
    """What of a weight decides which family takes it."""

    bits: int
    codes: torch.dtype
    tile: Tile
    has_zero_points: bool


class UnsupportedError(LookupError):
    """No family takes a weight with an input on a device.

    reason: what the nearest family takes instead. nearest: the name of the family that comes closest, which on a device
    without the arithmetic takes inputs in 16 bits; None if there is none.
    """

    def __init__(self, asked: str, reason: str, nearest: str | None) -> None:
        super().__init__(f"no kernel for {asked}: {reason}")
        self.reason = reason
        self.nearest = nearest


def format_of(weight: LinearWeight) -> WeightFormat:
    """Of a quantized weight. Several rows that share one scale are as good as one for all, 2 bits as good as 4."""
    rows, cols = weight.tile
    is_whole = cols >= weight.codes_NK.shape[1]
    tile = (rows, cols) if not is_whole else CHANNEL if rows == 1 else TENSOR
    return WeightFormat(weight.stored_bits, weight.codes_NK.dtype, tile, weight.zero_point_RG is not None)


@functools.cache
def gpu_families() -> dict[str, Family]:
    """Every family by its name; imports their kernels."""
    return {entry.name: entry.load() for entry in GPU_FAMILIES}


def find_gpu(
    weight: WeightFormat, input_dtype: torch.dtype, capability: tuple[int, int]
) -> tuple[GpuFamily, Family]:
    """The family for a weight and the dtype of x (or of its codes) on devices of this capability.

    Raises UnsupportedError, which says what the nearest family takes instead.
    """
    asked = (
        f"{_words(weight)} with inputs in {_name(input_dtype)} on compute capability {_version(capability)}"
    )
    differences = {entry: _differences(entry, weight, input_dtype) for entry in GPU_FAMILIES}
    nearest = min(differences, key=lambda entry: sum(distance for distance, _ in differences[entry]))
    if differences[nearest]:
        takes = "; ".join(text for _, text in differences[nearest])
        raise UnsupportedError(asked, f"{nearest.name} takes {takes}", nearest.name)
    family = nearest.load()
    if family.usable(1, capability):
        return nearest, family
    least = min(route.min_capability for route in family.routes)
    reason = f"{nearest.name} takes devices of compute capability {_version(least)} and newer"
    if nearest.inputs == FLOATS:
        raise UnsupportedError(asked, reason, None)
    try:
        instead, _ = find_gpu(weight, FLOATS[0], capability)
    except UnsupportedError:
        raise UnsupportedError(asked, reason, None) from None
    raise UnsupportedError(asked, f"{reason}, {instead.name} inputs in 16 bits on this one", instead.name)


def _differences(entry: GpuFamily, weight: WeightFormat, input_dtype: torch.dtype) -> list[tuple[int, str]]:
    """What a family takes that this is not: how far that is away, and words."""
    can_shift = entry.has_zero_points and weight.codes == torch.int8
    checks = (
        (8, weight.bits == entry.bits, f"weights of {entry.bits} bits, not {weight.bits}"),
        (4, weight.codes in entry.codes, f"codes in {_names(entry.codes)}, not {_name(weight.codes)}"),
        (2, input_dtype in entry.inputs, f"inputs in {_names(entry.inputs)}, not {_name(input_dtype)}"),
        (1, weight.tile in entry.tiles, f"scales per {_tiles(entry.tiles)}, not {_tile(weight.tile)}"),
        (1, can_shift or not weight.has_zero_points, f"no zero points of {_name(weight.codes)} codes"),
    )
    return [(distance, text) for distance, is_same, text in checks if not is_same]


def _words(weight: WeightFormat) -> str:
    words = f"weights of {weight.bits} bits in {_name(weight.codes)} with a scale per {_tile(weight.tile)}"
    return f"{words} and zero points" if weight.has_zero_points else words


def _version(capability: tuple[int, int]) -> str:
    return "{}.{}".format(*capability)


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(map(_name, dtypes))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _tiles(tiles: tuple[Tile, ...]) -> str:
    return ", ".join(map(_tile, tiles))


def _tile(tile: Tile) -> str:
    rows, cols = tile
    if cols is None:
        return "channel" if rows == 1 else "tensor"
    return f"group of {cols}" if rows == 1 else f"block of {rows} x {cols}"
