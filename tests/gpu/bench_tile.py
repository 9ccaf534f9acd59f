"""Times of products of tens to thousands of rows with INT4 weights, for every tiling that may be good.

    PYTHONPATH=.:kernels python tests/gpu/bench_tile.py int4|int8|fp8 [rows …]

The four products of a Llama-3.1-8B layer, group 128 symmetric, random codes and scales, in a CUDA graph over as many
distinct weights as make the L2 cache useless; every product starts while the one in front still runs. us.
"""

import itertools
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch.nn.functional import linear

from quantkit.bench.timing import time_chain
from quantkit_kernels import nvrtc
from quantkit_kernels.strip_weight import StripWeight
from quantkit_kernels.tile import KINDS, Tiling, defines_of, multiply, order, tile, tiling_of

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
GROUP, CACHE_BYTES = 128, 200 << 20
DEVICE = torch.device("cuda")
OTHERS = [(32, 2, 1, 3), (64, 2, 1, 4), (128, 2, 1, 5), (128, 1, 1, 5)]  # m_tile, halves, resident, x_stages
ALL = [tuple(kind[:4]) for kind in KINDS] + OTHERS


def operands(n, k, kind, count=None):
    """Distinct random weights of one shape; INT4 in groups, 8 bits with a scale per row."""
    count = count or -(-CACHE_BYTES // (n * k // 2))
    if kind != "int4":
        codes = torch.randint(-120, 120, (-(-count // 2), n, k), device="cuda", dtype=torch.int8)
        codes = codes if kind == "int8" else codes.view(torch.float8_e4m3fn)
        return [StripWeight(w, torch.rand(n, device="cuda"), None, None, (n, k), 8, 0) for w in codes]
    words = torch.randint(
        -(2**31), 2**31 - 1, (count, n // 16, k // 64, 32, 4), device="cuda", dtype=torch.int32
    )
    scales = torch.rand(count, n // 16, k // GROUP, 16, device="cuda").add(0.1).to(torch.bfloat16)
    return [StripWeight(w, s, None, None, (n, k), 4, GROUP) for w, s in zip(words, scales, strict=True)]


def product(x, weights, tiling):
    return time_chain([partial(tile, x, weight, tiling=tiling, dependent=True) for weight in weights], DEVICE)


def product_alone(x, weights, tiling):
    """x is in order already."""
    ordered = order(x, tiling.m_tile)
    return time_chain([partial(multiply, ordered, len(x), weight, tiling) for weight in weights], DEVICE)


def candidates(m, n):
    """Tilings that fit so many rows, and have a sane number of blocks."""
    fitting = min((m_tile for m_tile, *_ in ALL if m_tile >= m), default=256)
    for m_tile, halves, resident, x_stages in ALL:
        if m_tile != fitting and (m_tile < 128 or m <= 128):
            continue
        tiles = -(-m // m_tile) * -(-n // (128 * halves))
        for split in (1, 2, 3, 4, 6):
            if split == 1 or 60 <= tiles * split <= 132 * resident:
                yield Tiling(m_tile, halves, split, resident, x_stages)


def compile_all(kind):
    """Every kernel, at the same time."""
    weight = operands(128, 128, kind, 1)[0]

    def compiled(kind):
        m_tile, halves, resident, x_stages = kind
        tiling = Tiling(m_tile, halves, 1, resident, x_stages)
        defines = defines_of(weight, torch.bfloat16, tiling)
        nvrtc.cached_cubin("tile.cu", "tile", defines, torch.cuda.get_device_capability())

    with ThreadPoolExecutor() as pool:
        list(pool.map(compiled, ALL))


def main():
    kind = sys.argv[1]
    rows = [int(a) for a in sys.argv[2:]] or [17, 32, 64, 96, 128, 256, 512]
    compile_all(kind)
    print(torch.cuda.get_device_name())
    best = dict.fromkeys(itertools.product(rows, ["tile", "chosen", "alone", "bf16"]), 0.0)
    for name, (n, k) in SHAPES.items():
        weights = operands(n, k, kind)
        dense = [
            torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
            for _ in range(-(-CACHE_BYTES // (2 * n * k)))
        ]
        for m in rows:
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            times = {t: product(x, weights, t) for t in candidates(m, n)}
            bf16 = time_chain([partial(linear, x, w) for w in dense], DEVICE)
            chosen = product(x, weights, tiling_of(m, weights[0], 132))
            ranked = sorted(times, key=times.get)[:7]
            alone = product_alone(x, weights, ranked[0])
            line = "  ".join(f"{'/'.join(map(str, t))}:{times[t]:.1f}" for t in ranked)
            print(
                f"{name:8} M={m:5} bf16 {bf16:.1f} chosen {chosen:.1f} alone {alone:.1f} | {line}", flush=True
            )
            for column, time in (
                ("tile", times[ranked[0]]),
                ("chosen", chosen),
                ("alone", alone),
                ("bf16", bf16),
            ):
                best[m, column] += time
    for m in rows:
        print(
            f"layer M={m:5}", "  ".join(f"{c} {best[m, c]:.1f}" for c in ("bf16", "tile", "alone", "chosen"))
        )


if __name__ == "__main__":
    with torch.no_grad():
        main()
