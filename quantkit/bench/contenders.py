"""What is measured: families of kernels with random weights and inputs, and the bf16 product that they are to beat.

Codes and scales are random, not zeros: multipliers that have nothing to do draw less power and run faster.

Shape suffixes: M rows, N out_features, K in_features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit_kernels.catalog import (
    BLOCK,
    CHANNEL,
    GPU_FAMILIES,
    TENSOR,
    GpuFamily,
    Kernel,
    Tile,
    choose_float,
    choose_int8,
)
from quantkit_kernels.dense import linear
from quantkit_kernels.family import Family, Route
from quantkit_kernels.weight import LinearWeight

BASELINE = "bf16"
FORMATS_ON_CPU = {  # as in the families of a GPU: bits, codes, tile, input
    "w4a16": (4, torch.int8, (1, 128), torch.bfloat16),
    "w8a16": (8, torch.int8, CHANNEL, torch.bfloat16),
    "w8a16_fp8": (8, torch.float8_e4m3fn, CHANNEL, torch.bfloat16),
    "w8a8_int8": (8, torch.int8, CHANNEL, torch.int8),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """Routes that read one operand. make(n, k): a random one. missing: routes not on this device, each with the reason.

    weight_bytes: of one weight. in_blocks: x has a scale for each 128 columns. takes(k): whether weights of so many
    columns have these routes.
    """

    family: str
    routes: tuple[Route, ...]
    make: Callable[[int, int], Any]
    weight_bytes: float
    input_dtype: torch.dtype = torch.bfloat16
    in_blocks: bool = False
    missing: tuple[tuple[str, str], ...] = ()
    takes: Callable[[int], bool] = lambda k: True


def baseline(device: torch.device) -> Contender:
    """The product in bf16: of cuBLAS, or on a CPU the fastest way that the runtime has."""
    name = "cublas" if device.type == "cuda" else "dense"
    return Contender(
        family=BASELINE,
        routes=(Route(name=name, run=linear),),
        make=lambda n, k: torch.randn(n, k, dtype=torch.bfloat16, device=device),
        weight_bytes=2,
    )


def family_names(device: torch.device) -> tuple[str, ...]:
    """Of all that can be measured on a device."""
    return tuple(entry.name for entry in GPU_FAMILIES) if device.type == "cuda" else tuple(FORMATS_ON_CPU)


def contenders(name: str, device: torch.device) -> list[Contender]:
    """Of one family: on a GPU one, on a CPU one for each kernel, which has its own layout."""
    if device.type == "cuda":
        entry = next(entry for entry in GPU_FAMILIES if entry.name == name)
        return [_of_gpu(entry, entry.load(), device)]
    return _of_cpu(name)


def random_input(
    dtype: torch.dtype, m: int, k: int, device: torch.device, *, in_blocks: bool = False
) -> tuple[Tensor, dict[str, Any]]:
    """x [M, K], and what goes with codes: scales for each row, or in_blocks its 128 columns, and the output's dtype."""
    if dtype.is_floating_point and dtype.itemsize == 2:
        return torch.randn(m, k, dtype=dtype, device=device), {}
    more = {
        "x_scale": torch.rand(m, -(-k // 128) if in_blocks else 1, device=device) + 0.1,
        "out_dtype": torch.bfloat16,
    }
    return _random_codes(dtype, 8, m, k, device), more


def random_weight(
    bits: int, codes: torch.dtype, tile: Tile, n: int, k: int, device: torch.device
) -> LinearWeight:
    """Without zero points."""
    rows, cols = tile[0] or n, tile[1] or k
    scale = (torch.rand(-(-n // rows), -(-k // cols), device=device) + 0.1) * 0.01
    return LinearWeight(_random_codes(codes, bits, n, k, device), scale.bfloat16(), None, (rows, cols), bits)


def _random_codes(dtype: torch.dtype, bits: int, rows: int, cols: int, device: torch.device) -> Tensor:
    if dtype == torch.int8:
        limit = 1 << (bits - 1)
        return torch.randint(-limit, limit, (rows, cols), dtype=dtype, device=device)
    return torch.randn(rows, cols, dtype=torch.bfloat16, device=device).to(dtype)


def _of_gpu(entry: GpuFamily, family: Family, device: torch.device) -> Contender:
    def make(n: int, k: int) -> Any:
        if entry.tiles[0] == TENSOR and entry.bits == 16:
            return family.prepare(torch.randn(n, k, dtype=entry.codes[0], device=device))
        return family.prepare(random_weight(entry.bits, entry.codes[0], entry.tiles[0], n, k, device))

    capability = torch.cuda.get_device_capability(device)
    routes = family.usable(1, capability)
    return Contender(
        family=entry.name,
        routes=routes,
        make=make,
        weight_bytes=family.weight_bytes,
        input_dtype=entry.inputs[0],
        in_blocks=entry.tiles[0] == BLOCK,
        missing=tuple((route.name, _needs(route)) for route in family.routes if route not in routes),
    )


def _needs(route: Route) -> str:
    least, most = ("{}.{}".format(*of) if of else "" for of in (route.min_capability, route.max_capability))
    return (
        f"compute capability {least} alone"
        if least == most
        else f"compute capability {least} … {most}".rstrip(" …")
    )


def _of_cpu(name: str) -> list[Contender]:
    bits, codes, tile, input_dtype = FORMATS_ON_CPU[name]
    device, dtype = torch.device("cpu"), torch.bfloat16
    example = random_weight(bits, codes, tile, 128, 128, device)
    if input_dtype == torch.int8:
        kernel = choose_int8(example, dtype)
        if kernel is None:
            reason = "a CPU with VNNI, whose integer products are exact"
            return [
                Contender(
                    family=name, routes=(), make=_nothing, weight_bytes=1, missing=(("int8_int8", reason),)
                )
            ]
        kernels: tuple[Kernel, ...] = (kernel,)
    else:
        kernels = choose_float(example, dtype)

    def contender(kernel: Kernel) -> Contender:
        def run(
            x: Tensor, operand: Any, *, x_scale: Tensor | None = None, out_dtype: torch.dtype = dtype
        ) -> Tensor:
            return (
                kernel.run(x, operand)
                if x_scale is None
                else kernel.run(x, x_scale, None, operand).to(out_dtype)
            )

        return Contender(
            family=name,
            routes=(Route(name=kernel.name, run=run, max_rows=kernel.max_rows),),
            make=lambda n, k: kernel.prepare(random_weight(bits, codes, tile, n, k, device), dtype),
            weight_bytes=bits / 8,
            input_dtype=input_dtype,
            takes=lambda k: kernel.supports(random_weight(bits, codes, tile, 16, k, device), dtype),
        )

    return [contender(kernel) for kernel in kernels]


def _nothing(n: int, k: int) -> Any:
    raise AssertionError("no route, so nothing to prepare")
