"""Times of everything that GPTQ does with one Llama-3.1-8B layer, without the loop around it. Needs a GPU.

    PYTHONPATH=.:kernels python tests/gpu/bench_layer.py        # a minute or two

Medians of CUDA events after a warm-up, on random data. Prints one table; the last columns are what it comes to for 32
layers of 128 × 2048 tokens.
"""

import statistics
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantkit.algorithms.factor import Factor, factorize
from quantkit.algorithms.gptq import BLOCK_COLUMNS, gptq
from quantkit.algorithms.rtn import rtn
from quantkit.algorithms.scale_search import FEW_BIT_RATIOS, FEW_BIT_STEPS, search_qparams
from quantkit.observers.inputs import InputStats
from quantkit.schemes import IntSpec, PerGroup
from quantkit.schemes.tiles import dequantize_weight
from quantkit_kernels import gptq_block_kernel, moments, scale_search

NUM_LAYERS, NUM_TOKENS, BATCH_TOKENS = 32, 128 * 2048, 4 * 2048
HIDDEN, INNER, KEYS = 4096, 14336, 1024
LINEARS = {  # rows of the linears that read one input, and its width
    "q k v": ((HIDDEN, KEYS, KEYS), HIDDEN),
    "o": ((HIDDEN,), HIDDEN),
    "gate up": ((INNER, INNER), HIDDEN),
    "down": ((HIDDEN,), INNER),
}
SPEC = IntSpec(bits=4, granularity=PerGroup(128))
DEVICE = torch.device("cuda")


def milliseconds(work: Callable[..., object], *arguments: Any, repeats: int = 7) -> float:
    """Median over runs, each between two events."""
    times = []
    for _ in range(repeats + 2):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        work(*arguments)
        after.record()
        torch.cuda.synchronize()
        times.append(before.elapsed_time(after))
    return statistics.median(times[2:])


def peak_gigabytes(work: Callable[..., object], *arguments: Any) -> float:
    """Memory that the work takes on top of what is there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work(*arguments)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def show(name: str, ms: float, rate: str = "", per_run: float = 0.0) -> None:
    """A line of the table; per_run: how often the whole run does it."""
    total = f"{ms * per_run / 1e3:8.2f} s" if per_run else ""
    print(f"{name:<52}{ms:10.3f} ms  {rate:<28}{total}", flush=True)


def inputs(num_tokens: int, num_features: int) -> Tensor:
    """Correlated bf16 inputs with channels of different size."""
    x_TK = torch.randn(num_tokens, num_features, device=DEVICE)
    x_TK += torch.randn(num_tokens, 1, device=DEVICE) * torch.randn(num_features, device=DEVICE)
    return (x_TK * torch.logspace(-1, 0.5, num_features, device=DEVICE)).bfloat16()


def hessian(num_features: int) -> Tensor:
    """Second moments of `inputs`, float32."""
    total_KK = torch.zeros(num_features, num_features, device=DEVICE)
    for _ in range(4):
        x_TK = inputs(BATCH_TOKENS, num_features)
        total_KK += torch.mm(x_TK.T, x_TK, out_dtype=torch.float32)
    return total_KK / (4 * BATCH_TOKENS)


def ceilings() -> None:
    source = torch.randn(1 << 29, device=DEVICE)
    target = torch.empty_like(source)
    ms = milliseconds(target.copy_, source)
    show("copy 2 GiB", ms, f"{2 * source.nbytes / ms / 1e9:.2f} TB/s")
    for dtype, size in ((torch.bfloat16, 8192), (torch.float32, 8192), (torch.float64, 4096)):
        a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
        ms = milliseconds(torch.mm, a, b)
        show(f"{size}³ product in {dtype}", ms, f"{2 * size**3 / ms / 1e9:.0f} TFLOP/s")


def add_blocks(total_KK: Tensor, x_TK: Tensor, num_blocks: int) -> None:
    """total += xᵀx on and below the diagonal, without a temporary."""
    width = -(-len(total_KK) // num_blocks)
    for start in range(0, len(total_KK), width):
        rows, columns = slice(start, start + width), slice(0, start + width)
        part = total_KK[rows, columns]
        torch.addmm(part, x_TK[:, rows].T, x_TK[:, columns], out_dtype=torch.float32, out=part)


def statistics_of_inputs() -> None:
    for num_features, count in ((HIDDEN, 3), (INNER, 1)):
        share = count * NUM_LAYERS * NUM_TOKENS / BATCH_TOKENS
        x_TK = inputs(BATCH_TOKENS, num_features)
        total_KK = torch.zeros(num_features, num_features, device=DEVICE)
        flops = 2 * BATCH_TOKENS * num_features**2
        for num_blocks in (1, 2, 4, 6, 7, 8, 14):
            ms = milliseconds(add_blocks, total_KK, x_TK, num_blocks)
            done = flops * (num_blocks + 1) / (2 * num_blocks)
            rate = f"{done / ms / 1e9:.0f} TFLOP/s"
            show(f"H += xᵀx, K = {num_features}, lower {num_blocks} x {num_blocks} blocks", ms, rate, share)
        stats = InputStats(num_features, device=DEVICE, with_hessian=True)
        show(f"InputStats.add, K = {num_features}", milliseconds(stats.add, x_TK), "", share)
        ms = milliseconds(moments.moments, x_TK)
        show(f"moments, K = {num_features}", ms, f"{x_TK.nbytes / ms / 1e9:.2f} TB/s", share)


def factorization() -> None:
    for num_features, count in ((HIDDEN, 3), (INNER, 1)):
        hessian_KK = hessian(num_features)
        ms = milliseconds(factorize, hessian_KK, repeats=3)
        peak = peak_gigabytes(factorize, hessian_KK)
        rate = f"{num_features**3 / 3 / ms / 1e9:.1f} TFLOP/s, +{peak:.2f} GB"
        show(f"factorize, K = {num_features}", ms, rate, count * NUM_LAYERS)


def scales() -> None:
    importance_K = torch.rand(HIDDEN, device=DEVICE)
    w_NK = 0.02 * torch.randn(INNER, HIDDEN, device=DEVICE).bfloat16()
    share = sum(sum(rows) * columns for rows, columns in LINEARS.values()) / w_NK.numel() * NUM_LAYERS
    importance_GS = importance_K.reshape(-1, 128)
    even = [0.5 + 0.01 * step for step in range(61)]
    for name, importance, ratios, steps in (
        ("|e|^2.5", None, list(FEW_BIT_RATIOS), list(FEW_BIT_STEPS)),
        ("importance e²", importance_GS, list(FEW_BIT_RATIOS), list(FEW_BIT_STEPS)),
        ("importance e², 61 ratios", importance_GS, even, []),
    ):
        arguments = w_NK.reshape(-1, 128), importance, ratios, steps, "either sign", -8, 7, torch.bfloat16
        ms = milliseconds(scale_search.scale_search, *arguments)
        rate = f"{w_NK.numel() * (len(ratios) + len(steps)) / ms / 1e9:.2f} T candidates/s"
        show(f"scale search kernel, {name}", ms, rate, share)
    ms = milliseconds(rtn, w_NK, SPEC, torch.bfloat16)
    show("rtn", ms, f"+{peak_gigabytes(rtn, w_NK, SPEC, torch.bfloat16):.2f} GB", share)


def block_arguments(num_rows: int) -> tuple:
    w = 0.02 * torch.randn(1, BLOCK_COLUMNS, num_rows, device=DEVICE).bfloat16()
    carried = 0.002 * torch.randn(1, BLOCK_COLUMNS, num_rows, device=DEVICE)
    lower_CC = torch.linalg.cholesky(hessian(BLOCK_COLUMNS).double()).float().unsqueeze(0)
    scale = (0.008 + 0.002 * torch.rand(1, 32, num_rows, device=DEVICE)).bfloat16()
    group = torch.randint(0, 32, (BLOCK_COLUMNS,), device=DEVICE)
    return w, carried, lower_CC, scale, None, group, -8, 7, False


def block_kernel() -> None:
    for num_rows in (KEYS, HIDDEN, INNER, 2 * INNER):
        arguments = block_arguments(num_rows)
        for rows, num_warps in ((16, 1), (16, 2), (32, 1), (32, 2), (32, 4), (32, 8), (64, 4), (64, 8)):
            launch = partial(gptq_block_kernel.launch, *arguments, rows=rows, num_warps=num_warps)
            name = f"block of 128 columns, N = {num_rows}, {rows} rows, {num_warps} warps"
            show(name, milliseconds(launch, repeats=15))


def rounding() -> None:
    for name, (rows, num_features) in LINEARS.items():
        factor = factorize(hessian(num_features))
        assert factor is not None
        for num_rows in sorted(set(rows)):
            w_NK = 0.02 * torch.randn(num_rows, num_features, device=DEVICE).bfloat16()
            arguments = w_NK, factor, SPEC, search_qparams(w_NK, SPEC, torch.bfloat16)
            share = rows.count(num_rows) * NUM_LAYERS
            ms = milliseconds(gptq, *arguments, repeats=3)
            rate = f"{num_rows * num_features**2 / ms / 1e9:.1f} TFLOP/s, +{peak_gigabytes(gptq, *arguments):.2f} GB"
            show(f"gptq, {name}: {num_rows} x {num_features}", ms, rate, share)
            half = num_features // 2
            lost_CN = torch.randn(BLOCK_COLUMNS, num_rows, device=DEVICE)
            carried_KN = torch.zeros(half, num_rows, device=DEVICE)
            lower_CK = factor.lower_KK[half : half + BLOCK_COLUMNS, :half]
            ms = milliseconds(carried_KN.addmm_, lower_CK.T, lost_CN)
            rate = f"{2 * BLOCK_COLUMNS * half * num_rows / ms / 1e9:.1f} TFLOP/s"
            show("    a product in the middle", ms, rate, share * num_features / BLOCK_COLUMNS)


def loss(error_NK: Tensor, hessian_KK: Tensor) -> Tensor:
    """The report's loss."""
    return ((error_NK @ hessian_KK).float() * error_NK.float()).sum(dim=1).mean()


def losses() -> None:
    hessian_KK = hessian(INNER)
    error_NK = 0.002 * torch.randn(HIDDEN, INNER, device=DEVICE)
    exact = ((error_NK.double() @ hessian_KK.double()) * error_NK.double()).sum(dim=1).mean().item()
    work = sum(sum(rows) * columns**2 for rows, columns in LINEARS.values())
    share = work / (HIDDEN * INNER**2) * NUM_LAYERS * 2  # before and after
    for name, dtype, tf32 in (
        ("float32", torch.float32, False),
        ("TF32", torch.float32, True),
        ("bf16", torch.bfloat16, False),
    ):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        arguments = error_NK.to(dtype), hessian_KK.to(dtype)
        off = abs(loss(*arguments).item() / exact - 1)
        show(
            f"loss of {HIDDEN} x {INNER} in {name}",
            milliseconds(loss, *arguments),
            f"off by {off:.1e}",
            share,
        )
    torch.backends.cuda.matmul.allow_tf32 = False


def by_definition(w_NK: Tensor, hessian_KK: Tensor, factor: Factor, scale_NG: Tensor) -> Tensor:
    """The recursion of `algorithms.gptq`, column by column in float64: codes [N, K]."""
    order_K = factor.order_K
    damped_KK = hessian_KK.double()[order_K][:, order_K]
    damped_KK.diagonal().add_(factor.damping * hessian_KK.diagonal().double().mean())
    lower_KK = torch.linalg.cholesky(damped_KK)
    w = w_NK.double()[:, order_K]
    scale = scale_NG.double()[:, order_K // 128]
    carried, codes = torch.zeros_like(w), torch.empty_like(w)
    for column in reversed(range(w.shape[1])):
        target = w[:, column] + carried[:, column] / lower_KK[column, column]
        codes[:, column] = (target / scale[:, column]).round().clamp(-8, 7)
        lost = w[:, column] - codes[:, column] * scale[:, column]
        carried[:, :column].addr_(lost, lower_KK[column, :column])
    codes_NK = torch.empty_like(codes, dtype=torch.int8)
    codes_NK[:, order_K] = codes.to(torch.int8)
    return codes_NK


def exactness() -> None:
    """float32 on the GPU against the same recursion in float64."""
    hessian_KK = hessian(HIDDEN)
    factor = factorize(hessian_KK)
    assert factor is not None
    w_NK = 0.02 * torch.randn(512, HIDDEN, device=DEVICE).bfloat16()
    nearest_NK, qparams = rtn(w_NK, SPEC, torch.bfloat16)
    expected_NK = by_definition(w_NK, hessian_KK, factor, qparams.scale)

    def exact_loss(codes_NK: Tensor) -> float:
        error_NK = dequantize_weight(codes_NK, SPEC.granularity, qparams).double() - w_NK.double()
        return ((error_NK @ hessian_KK.double()) * error_NK).sum().item()

    print(f"loss in float64 {exact_loss(expected_NK):.6e}, of nearest {exact_loss(nearest_NK):.6e}")
    for name, tf32 in (("float32", False), ("TF32 products", True)):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        got_NK = gptq(w_NK, factor, SPEC, qparams)
        is_repeated = torch.equal(got_NK, gptq(w_NK, factor, SPEC, qparams))
        torch.backends.cuda.matmul.allow_tf32 = False
        is_off = got_NK != expected_NK
        codes, rows = is_off.double().mean().item(), is_off.any(dim=1).double().mean().item()
        print(
            f"in {name} {exact_loss(got_NK):.6e}; {codes:.1e} of the codes and {rows:.3f} of the rows differ"
        )
        print(f"    the same again: {is_repeated}")


def main() -> None:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    torch.manual_seed(0)
    started = time.perf_counter()
    for part in (
        ceilings,
        exactness,
        block_kernel,
        rounding,
        scales,
        statistics_of_inputs,
        factorization,
        losses,
    ):
        print(f"-- {part.__name__} (after {time.perf_counter() - started:.0f} s)", flush=True)
        try:
            with torch.no_grad():
                part()
        except (
            RuntimeError,
            TypeError,
            AssertionError,
        ):  # the other parts are worth their time on the machine
            traceback.print_exc()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
