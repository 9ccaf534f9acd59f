"""Times of attention over pages with the heads of Llama-3.1-8B. Needs a GPU.

    PYTHONPATH=.:kernels python tests/gpu/bench_attention.py           # the tables
    PYTHONPATH=.:kernels python tests/gpu/bench_attention.py sweep     # other tiles, blocks and splits

Each number is the median of some replays of a CUDA graph that reads different blocks, in random order, in every
launch, more than the L2 cache holds. Bytes are those of the keys, values and scales that the queries see.
"""

import functools
import itertools
import math
import sys
import traceback
from collections.abc import Iterator

import torch
from torch import Tensor

from quantkit.bench.timing import time_chain
from quantkit_kernels import attention_decode, attention_prefill
from quantkit_kernels.paged_kv import KVPool, Masking, Pages

NUM_QUERIES, NUM_HEADS, HEAD_DIM = 32, 8, 128
DEVICE = torch.device("cuda")
CEILING = 3.1e12  # bytes per second read by a kernel that does nothing else, H100 SXM
MASKING = Masking(1 / math.sqrt(HEAD_DIM))
POOL_TOKENS = 1 << 21
GRAPH_BYTES = 1.5e9
KINDS = ("bf16", "e4m3", "int8", "e4m3 per token", "int8 per token")


@functools.lru_cache(maxsize=1)
def pool(kind: str, block_size: int) -> KVPool:
    shape = (POOL_TOKENS // block_size, NUM_HEADS, block_size, HEAD_DIM)
    if kind == "bf16":
        return KVPool(*(torch.randn(shape, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)))
    codes = [
        torch.randint(-120, 120, shape, dtype=torch.int8, device=DEVICE) & ~8 for _ in range(2)
    ]  # no NaN
    scale_shape = shape[:3] if kind.endswith("token") else (NUM_HEADS,)
    scales = [torch.rand(scale_shape, device=DEVICE) * 0.01 for _ in range(2)]
    return KVPool(*(code.view(torch.float8_e4m3fn) if kind[0] == "e" else code for code in codes), *scales)


def bytes_of_token(kind: str) -> int:
    return 2 * NUM_HEADS * (HEAD_DIM * (2 if kind == "bf16" else 1) + 4 * kind.endswith("token"))


def steps(batch: int, context: int, q_len: int, block_size: int, count: int) -> Iterator[Pages]:
    """Batches of other blocks each."""
    num_blocks, used = POOL_TOKENS // block_size, context // block_size
    lengths = torch.full((batch,), context, dtype=torch.int32, device=DEVICE)
    offsets = torch.arange(batch + 1, dtype=torch.int32, device=DEVICE) * q_len
    order = torch.randperm(num_blocks, device=DEVICE)
    for number in range(count):
        block = torch.arange(batch * used, device=DEVICE) + number * batch * used
        table_BL = order[block % num_blocks].int().reshape(batch, used)
        yield Pages(table_BL, lengths, offsets, q_len, context)


def queries(num_tokens: int) -> Tensor:
    return torch.randn(num_tokens, NUM_QUERIES, HEAD_DIM, dtype=torch.bfloat16, device=DEVICE)


def decode(kind: str, batch: int, context: int, q_len: int = 1, block_size: int = 16, **options) -> float:
    kv = pool(kind, block_size)
    count = max(1, min(40, round(GRAPH_BYTES / (batch * context * bytes_of_token(kind)))))
    q_TQD = queries(batch * q_len)
    return time_chain([
        functools.partial(attention_decode.launch, q_TQD, kv, pages, MASKING, **options)
        for pages in steps(batch, context, q_len, block_size, count)
    ], DEVICE)  # fmt: skip


def rate(kind: str, batch: int, context: int, us: float) -> float:
    """Share of the ceiling."""
    return batch * context * bytes_of_token(kind) / us * 1e6 / CEILING


def prefill(kind: str, num_tokens: int, prefix: int = 0, block_size: int = 16, **options) -> float:
    kv = pool(kind, block_size)
    q_TQD = queries(num_tokens)
    return time_chain([
        functools.partial(attention_prefill.launch, q_TQD, kv, pages, MASKING, **options)
        for pages in steps(1, num_tokens + prefix, num_tokens, block_size, 4)
    ], DEVICE)  # fmt: skip


def flash(num_tokens: int) -> float:
    """torch's flash attention over contiguous bf16."""
    q, k, v = (
        torch.randn(1, heads, num_tokens, HEAD_DIM, dtype=torch.bfloat16, device=DEVICE)
        for heads in (NUM_QUERIES, NUM_HEADS, NUM_HEADS)
    )
    attention = torch.nn.functional.scaled_dot_product_attention
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        return time_chain(
            [functools.partial(attention, q, k, v, is_causal=True, enable_gqa=True)] * 4, DEVICE
        )


def decode_table(q_len: int = 1) -> None:
    print(f"decode, {q_len} new tokens: us, share of {CEILING / 1e12} TB/s, ratio to bf16")
    shapes = list(itertools.product((1, 16, 64, 256), (1024, 8192, 32768)))
    of_bf16 = {}
    for kind in KINDS:
        cells = []
        for batch, context in shapes:
            us = decode(kind, batch, context, q_len)
            ratio = of_bf16.setdefault((batch, context), us) / us
            cells.append(
                f"{batch}x{context // 1024}k {us:.1f} {rate(kind, batch, context, us):.2f} {ratio:.2f}"
            )
        print(f"{kind:<15}" + " | ".join(cells), flush=True)


def latency_table() -> None:
    """One new token of one sequence: what a layer of a model waits for at batch 1."""
    print("decode of one sequence, us")
    for kind in KINDS:
        cells = [f"{context} {decode(kind, 1, context):.2f}" for context in (128, 256, 512, 1024, 2048, 4096)]
        print(f"{kind:<15}" + " | ".join(cells), flush=True)


def prefill_table() -> None:
    sizes = (512, 2048, 8192)
    of_torch = {size: flash(size) for size in sizes}
    print("prefill: us, TFLOP/s, speed relative to torch's flash attention")
    print(
        "flash          "
        + " | ".join(f"{size} {us:.1f} {tflops(size, us):.0f}" for size, us in of_torch.items())
    )
    for kind in KINDS:
        cells = []
        for size in sizes:
            us = prefill(kind, size)
            cells.append(f"{size} {us:.1f} {tflops(size, us):.0f} {of_torch[size] / us:.2f}")
        print(f"{kind:<15}" + " | ".join(cells), flush=True)


def tflops(num_tokens: int, us: float) -> float:
    return 2 * NUM_QUERIES * HEAD_DIM * num_tokens * (num_tokens + 1) / us / 1e6


DECODE_SHAPES = ((16, 64, 4, 3), (16, 128, 4, 3), (16, 64, 2, 3))
VERIFY_SHAPES = ((16, 64, 4, 3), (16, 128, 4, 3), (32, 64, 4, 3), (64, 64, 4, 3), (64, 128, 4, 2))
PREFILL_SHAPES = ((64, 64, 4, 2), (128, 64, 8, 3), (128, 128, 8, 2))


def sweep() -> None:
    for kind, block_size, shape in itertools.product(KINDS, (16, 64), DECODE_SHAPES):
        cells = []
        for batch, context, splits in (
            (1, 1024, 8),
            (1, 8192, 32),
            (16, 1024, 1),
            (16, 8192, 4),
            (64, 8192, 4),
        ):
            us = decode(kind, batch, context, 1, block_size, shape=shape, splits=splits)
            cells.append(f"{batch}x{context}/{splits} {us:.1f} {rate(kind, batch, context, us):.2f}")
        print(f"{kind} blocks of {block_size}, tile {shape}: " + " | ".join(cells), flush=True)


def sweep_rows() -> None:
    """Many new tokens in a sequence."""
    for kind, q_len, shape in itertools.product(("bf16", "e4m3", "int8 per token"), (8, 16), VERIFY_SHAPES):
        cells = []
        for batch, context in ((1, 8192), (16, 8192), (64, 8192)):
            us = decode(kind, batch, context, q_len, 16, shape=shape, splits=4 if batch > 1 else 32)
            cells.append(f"{batch}x{context} {us:.1f} {rate(kind, batch, context, us):.2f}")
        print(f"{kind} {q_len} new tokens, tile {shape}: " + " | ".join(cells), flush=True)


def sweep_splits() -> None:
    for kind, (batch, context) in itertools.product(
        ("bf16", "e4m3"),
        ((1, 1024), (1, 8192), (1, 32768), (4, 8192), (16, 1024), (16, 8192), (64, 1024), (64, 8192)),
    ):
        cells = [
            f"{splits}: {decode(kind, batch, context, splits=splits):.1f}"
            for splits in (1, 2, 4, 8, 16, 32, 64)
            if splits * 64 <= context and splits * batch <= 2048 and splits * batch * NUM_HEADS >= 32
        ]
        print(f"{kind} {batch}x{context} splits " + " | ".join(cells), flush=True)


def sweep_prefill() -> None:
    for kind, block_size, shape in itertools.product(KINDS, (16, 64), PREFILL_SHAPES):
        cells = [
            f"{size} {prefill(kind, size, 0, block_size, shape=shape):.1f}" for size in (512, 2048, 8192)
        ]
        print(f"prefill {kind} blocks of {block_size} {shape}: " + " | ".join(cells), flush=True)


PARTS = {
    "tables": (latency_table, decode_table, functools.partial(decode_table, 4), prefill_table),
    "sweep": (sweep, sweep_rows, sweep_prefill, sweep_splits),
}


def main() -> None:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    torch.manual_seed(0)
    for part in PARTS[sys.argv[1] if len(sys.argv) > 1 else "tables"]:
        try:
            part()
        except (RuntimeError, AssertionError):  # the other parts are worth their time on the machine
            traceback.print_exc()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
