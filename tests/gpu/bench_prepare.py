"""Weights laid out for kernels on a GPU, and products whose rows no batch changes. Needs a GPU.

    PYTHONPATH=.:kernels python tests/gpu/bench_prepare.py

Layouts: GB of stored codes a second, the largest weight of a Llama-3.1-8B layer. Products: us of the four of a layer,
each in a CUDA graph over distinct weights, as they are and batch-invariant.
"""

from functools import partial

import torch

from quantkit.bench.contenders import random_input, random_weight
from quantkit.bench.timing import time_chain
from quantkit_kernels import product
from quantkit_kernels.catalog import CHANNEL
from tests.gpu.bench_skinny import LAYERS_8B

DEVICE = torch.device("cuda")
FP8, INT8, BF16 = torch.float8_e4m3fn, torch.int8, torch.bfloat16
KINDS = {  # bits, codes, tile, input
    "W4A16 g128": (4, INT8, (1, 128), BF16),
    "W8A16 INT8": (8, INT8, CHANNEL, BF16),
    "W8A16 FP8": (8, FP8, CHANNEL, BF16),
    "FP8 W8A8": (8, FP8, CHANNEL, FP8),
    "INT8 W8A8": (8, INT8, CHANNEL, INT8),
}
ROWS = (1, 16, 64, 256)


def laid_out(kind, n, k, **options):
    bits, codes, tile, input_dtype = KINDS[kind]
    weight = random_weight(bits, codes, tile, n, k, DEVICE)
    return product.prepare(weight, input_dtype, torch.cuda.get_device_capability(), **options)


def layout_rate(kind):
    """GB/s of codes as they are stored, of the fastest of some runs."""
    bits, codes, tile, input_dtype = KINDS[kind]
    n, k = LAYERS_8B["gate_up"]
    weight = random_weight(bits, codes, tile, n, k, DEVICE)
    times = []
    for _ in range(5):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        product.prepare(weight, input_dtype, torch.cuda.get_device_capability())
        after.record()
        torch.cuda.synchronize()
        times.append(before.elapsed_time(after) * 1e-3)
    return n * k * bits / 8 / min(times) / 1e9


def layer_us(kind, m, **options):
    """The sum of a layer's products."""
    input_dtype = KINDS[kind][3]
    total = 0.0
    for n, k in LAYERS_8B.values():
        weights = [laid_out(kind, n, k, **options) for _ in range(max(2, (300 << 20) // (n * k)))]
        x, more = random_input(input_dtype, m, k, DEVICE)
        total += time_chain([partial(product.multiply, x, weight, **more) for weight in weights], DEVICE)
    return total


def main():
    """Both tables."""
    print(torch.cuda.get_device_name())
    for kind in KINDS:
        print(f"{kind:12} laid out at {layout_rate(kind):6.1f} GB/s", flush=True)
    print(f"{'us, M =':32}" + "".join(f"{m:9}" for m in ROWS))
    for kind in KINDS:
        for name, options in (("", {}), ("batch-invariant", {"batch_invariant": True})):
            times = "".join(f"{layer_us(kind, m, **options):9.1f}" for m in ROWS)
            print(f"{kind:12} {name:18} {times}", flush=True)


if __name__ == "__main__":
    main()
