"""Times of products of few rows: the four of a Llama-3.1-8B or 70B layer, one after the other in a CUDA graph.

    PYTHONPATH=.:kernels python tests/gpu/bench_skinny.py

Random codes and scales, as many layers as make the L2 cache useless. alone: each kernel waits for the one in front;
dependent: it prefetches its weights meanwhile. us per layer; TB/s of weights and scales.
"""

import sys
from functools import partial

import torch

from quantkit.bench.timing import time_chain
from quantkit_kernels import strip_weight as s
from quantkit_kernels.skinny import skinny

LAYERS_8B = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
LAYERS_70B = {"qkv": (10240, 8192), "o": (8192, 8192), "gate_up": (57344, 8192), "down": (8192, 28672)}


def operand(n, k, kind, group):
    if kind == "bf16":
        return s.prepare_dense(torch.randn(n, k, device="cuda", dtype=torch.bfloat16))
    if kind == "int4":
        words = torch.randint(-(2**31), 2**31, (n // 16, k // 64, 32, 4), device="cuda").to(torch.int32)
        scale = torch.rand(n // 16, k // group, 16, device="cuda").add(0.1).to(torch.bfloat16)
        return s.StripWeight(words, scale, None, None, (n, k), 4, group)
    codes = torch.randint(-128, 128, (n, k), device="cuda", dtype=torch.int8)
    if kind == "fp8":
        codes = torch.randn(n, k, device="cuda").to(torch.float8_e4m3fn)
    return s.StripWeight(codes, torch.rand(n, device="cuda"), None, None, (n, k), 8, 0)


def bytes_of(weight):
    return sum(t.numel() * t.element_size() for t in weight if isinstance(t, torch.Tensor))


def x_for(k, m, x_kind):
    if x_kind == "fp8":
        return torch.randn(m, k, device="cuda").to(torch.float8_e4m3fn)
    if x_kind == "int8":
        return torch.randint(-128, 128, (m, k), device="cuda", dtype=torch.int8)
    return torch.randn(m, k, device="cuda", dtype=torch.bfloat16)


def measure(shapes, kind, x_kind="bf16", group=128, rows=(1, 8, 16), copies=8, by_shape=True):
    weights = {name: [operand(n, k, kind, group) for _ in range(copies)] for name, (n, k) in shapes.items()}
    total = sum(bytes_of(w[0]) for w in weights.values())
    for m in rows:
        xs = {name: x_for(k, m, x_kind) for name, (_, k) in shapes.items()}
        more = (
            {} if x_kind == "bf16" else {"x_scale": torch.rand(m, device="cuda"), "out_dtype": torch.bfloat16}
        )

        def us(dependent, names, xs=xs, more=more):
            """Of one layer's products of these names."""
            chain = [
                partial(skinny, xs[name], weights[name][i], dependent=dependent, **more)
                for i in range(copies)
                for name in names
            ]
            return time_chain(chain, torch.device("cuda")) * len(names)

        alone, chained = (us(dependent, shapes) for dependent in (False, True))
        line = f"{kind} x {x_kind} M={m:3}  alone {alone:6.1f}  dependent {chained:6.1f} us"
        line += f"  {total / chained / 1e6:.2f} TB/s "
        if by_shape:
            for name in shapes:
                line += f" {name} {us(False, [name]):.1f}/{us(True, [name]):.1f}"
        print(line, flush=True)


if __name__ == "__main__":
    print(torch.cuda.get_device_name(), sys.argv[1:])
    measure(LAYERS_8B, "int4", rows=(1, 4, 8, 16, 32))
    measure(LAYERS_70B, "int4", copies=3)
    for kind, x_kind in (
        ("int8", "bf16"),
        ("fp8", "bf16"),
        ("fp8", "fp8"),
        ("int8", "int8"),
        ("bf16", "bf16"),
    ):
        measure(LAYERS_8B, kind, x_kind, copies=4 if kind == "bf16" else 6)
