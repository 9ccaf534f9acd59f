"""Times of products with quantized activations: the four of a Llama-3.1-8B layer in a CUDA graph, and of expert layers.

    PYTHONPATH=.:kernels python tests/gpu/bench_w8a8.py [fp8 int8 blocks w4a8 moe]

Random codes and scales, as many layers as make the L2 cache useless. us per layer, its bf16 (cuBLAS) beside it; TB/s of
weights and scales, TFLOP/s. The activations' quantization is not in it: it is fused into the kernel in front.
"""

import sys
from functools import partial

import torch
from torch.nn.functional import linear

from quantkit.bench.timing import time_chain
from quantkit_kernels import moe, moe_routing, w4a8, w8a8_fp8, w8a8_int8
from tests.gpu.bench_skinny import LAYERS_8B

ROWS = (1, 8, 16, 17, 32, 33, 64, 65, 96, 128, 129, 256, 512, 1024, 2048, 4096)
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
COPIES = 3
DEVICE = torch.device("cuda")
MODELS = {"mixtral": (8, 2, 28672, 14336, 4096), "qwen3-30b": (128, 8, 1536, 768, 2048)}


def codes(rows, cols, kind):
    if kind == "int8":
        return torch.randint(-128, 128, (rows, cols), device="cuda", dtype=torch.int8)
    return torch.randn(rows, cols, device="cuda").mul(50).to(FP8)


def fragments(n, k, *leading):
    return torch.randint(-(2**31), 2**31, (*leading, n // 16, k // 64, 32, 4), device="cuda").to(torch.int32)


def products(kind, n, k):
    """A function of (codes, scale) for one weight, and its bytes."""
    if kind in ("fp8", "blocks"):
        scale = (
            torch.rand(n // 128, k // 128, device="cuda")
            if kind == "blocks"
            else torch.rand(n, device="cuda")
        )
        weight = w8a8_fp8.Fp8Weight(codes(n, k, "fp8"), scale, (n, k))
        return lambda x, s: w8a8_fp8.multiply(x, s, weight, None, BF16), n * k
    if kind == "int8":
        w = codes(n, k, "int8")
        weight = w8a8_int8.Int8Weight(
            w, torch.rand(n, device="cuda"), w.sum(1, dtype=torch.int32), torch.rand(n, device="cuda")
        )
        return lambda x, s: w8a8_int8.multiply(x, s, None, weight, None, BF16), n * k
    group = 0 if kind.endswith("channel") else 128
    scale = (
        torch.rand(n // 16, k // group, 16, device="cuda").to(BF16) if group else torch.rand(n, device="cuda")
    )
    args = fragments(n, k), scale, None, None, None, n, group, BF16
    return lambda x, s: w4a8.w4a8(x, s, None, *args), n * k / 2 + (n * k / 64 if group else 0)


def bench_layers(kinds):
    for kind in kinds:
        x_kind = "int8" if "int8" in kind else "fp8"
        made = {name: [products(kind, n, k) for _ in range(COPIES)] for name, (n, k) in LAYERS_8B.items()}
        num_bytes = sum(each[0][1] for each in made.values())
        for m in ROWS:
            line, total = f"{kind:14} M={m:4} ", 0.0
            for name, (_, k) in LAYERS_8B.items():
                x = codes(m, k, x_kind)
                scale = torch.rand(m, k // 128 if kind == "blocks" else 1, device="cuda")
                us = time_chain([partial(run, x, scale) for run, _ in made[name]], DEVICE)
                total += us
                line += f" {name} {us:6.1f}"
            in_turn = time_chain(chained(made, m, x_kind, kind == "blocks"), DEVICE) * len(made)
            flops = 2 * m * sum(n * k for n, k in LAYERS_8B.values())
            print(f"{line}  sum {total:7.1f}  in turn {in_turn:7.1f} us", end="")
            print(f"  {num_bytes / total / 1e6:.2f} TB/s {flops / total / 1e6:6.0f} TFLOP/s", flush=True)


def chained(made, m, x_kind, in_blocks):
    """The four products one after the other, layer by layer."""
    xs = {name: codes(m, k, x_kind) for name, (_, k) in LAYERS_8B.items()}
    scales = {
        name: torch.rand(m, k // 128 if in_blocks else 1, device="cuda") for name, (_, k) in LAYERS_8B.items()
    }
    return [partial(made[name][i][0], xs[name], scales[name]) for i in range(COPIES) for name in made]


def bench_bf16():
    weights = {
        name: [torch.randn(n, k, device="cuda", dtype=BF16) for _ in range(COPIES)]
        for name, (n, k) in LAYERS_8B.items()
    }
    for m in ROWS:
        total = 0.0
        for name, (_, k) in LAYERS_8B.items():
            x = torch.randn(m, k, device="cuda", dtype=BF16)
            total += time_chain([partial(linear, x, w) for w in weights[name]], DEVICE)
        print(f"{'bf16 cuBLAS':14} M={m:4}  sum {total:7.1f} us", flush=True)


def experts(count, n, k, kind):
    if kind == "int4":
        scale = torch.rand(count, n // 16, k // 128, 16, device="cuda").to(BF16)
        return moe.ExpertWeight(fragments(n, k, count), scale, None, (n, k), 128)
    if kind == "bf16":
        return moe.prepare_dense((torch.randn(n, k, device="cuda", dtype=BF16) for _ in range(count)), count)
    stored = torch.empty(count, n, k, dtype=FP8, device="cuda")
    for expert in stored:
        expert.copy_(codes(n, k, "fp8"))
    return moe.ExpertWeight(stored, torch.rand(count, n, device="cuda"), None, (n, k), 0)


def bench_moe():
    """Both products of a layer's experts, sorting and combining included."""
    for model, (count, per_token, n_up, k_down, hidden) in MODELS.items():
        for kind, x_kind in (("int4", "bf16"), ("fp8", "fp8"), ("fp8", "bf16"), ("bf16", "bf16")):
            layers = [
                (experts(count, n_up, hidden, kind), experts(count, hidden, k_down, kind)) for _ in range(2)
            ]
            for m in (1, 8, 64, 512, 4096):
                ids = torch.rand(m, count, device="cuda").argsort(dim=1)[:, :per_token].contiguous()
                gates, pairs = torch.rand(m, per_token, device="cuda"), m * per_token
                x = [torch.randn(rows, k, device="cuda") for rows, k in ((m, hidden), (pairs, k_down))]
                x = [each.to(FP8 if x_kind == "fp8" else BF16) for each in x]
                scales = [torch.rand(len(each), 1, device="cuda") if x_kind == "fp8" else None for each in x]

                def layer(up, down, x=x, scales=scales, ids=ids, gates=gates, pairs=pairs, count=count):
                    routed = moe_routing.sort_by_expert(ids, count, moe.rows_for(pairs, up))
                    y = moe.multiply(x[0], scales[0], up, *routed, pairs, BF16)
                    down_y = moe.multiply(x[1], scales[1], down, *routed, pairs, BF16)
                    return y, moe_routing.combine(down_y, gates, BF16)

                hit = len(ids.unique())
                per_weight = {"int4": 0.516, "fp8": 1, "bf16": 2}[kind]
                num_bytes = hit * per_weight * (n_up * hidden + hidden * k_down)
                flops = 2 * pairs * (n_up * hidden + hidden * k_down)
                us = time_chain([partial(layer, *each) for each in layers], DEVICE)
                print(
                    f"{model:10} {kind:4} x {x_kind:4} T={m:4}  {us:8.1f} us  {num_bytes / us / 1e6:.2f} TB/s",
                    end="",
                )
                print(f" of {hit} experts  {flops / us / 1e6:.0f} TFLOP/s", flush=True)


if __name__ == "__main__":
    names = sys.argv[1:] or ["fp8", "int8", "blocks", "w4a8", "moe"]
    print(torch.cuda.get_device_name(), names)
    if "moe" in names:
        bench_moe()
    kinds = [name for name in names if name in ("fp8", "int8", "blocks")]
    if "w4a8" in names:
        kinds += ["int4xint8 g128", "int4xfp8 g128", "int4xint8 channel", "int4xfp8 channel"]
    if kinds:
        bench_bf16()
    bench_layers(kinds)
