"""Times of what stands between the products, and the share of the copy bandwidth they reach. Needs a GPU.

    PYTHONPATH=.:kernels python tests/gpu/bench_neighbours.py        # half a minute

Each line: one kernel in a CUDA graph, again and again on different data, more than the L2 holds. Bytes are those that
have to be read and written.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from quantkit.bench.timing import time_chain
from quantkit_kernels import (
    embedding_kernel,
    hadamard_kernel,
    norm_kernel,
    rope_kernel,
    row_codes_kernel,
    sampling_kernel,
    silu_kernel,
)
from quantkit_kernels.norm_quant import Norm
from quantkit_kernels.rope_append import Append
from quantkit_kernels.row_codes import Codes

L2_BYTES = 50 << 20
LAUNCHES = 16  # of a graph at least, so that its own start does not count
HIDDEN, INNER, QUERIES, HEADS, DIM, VOCAB = 4096, 14336, 32, 8, 128, 128256


def microseconds(works: list[Callable[[], Any]]) -> float:
    """Of one of the works, in a graph of all of them, in turn."""
    works = list(itertools.islice(itertools.cycle(works), max(LAUNCHES, len(works))))
    return time_chain(works, torch.device("cuda"))


def copies_for(num_bytes: int) -> int:
    """How many operands exceed the L2 by far; few of large ones, and no more than is quick to make."""
    return max(2, min(64, 4 * L2_BYTES // max(num_bytes, 1)))


def copy_rate() -> float:
    """Bytes read and written per second by a copy of 1 GiB."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / microseconds([lambda: torch.mul(source, 1.0, out=target)]) * 1e6


def table(lines: Iterator[tuple[str, int, list[Callable[[], Any]]]]) -> None:
    """Print name, time, rate and share of the copy rate of each line: (name, bytes, works)."""
    ceiling = copy_rate()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {ceiling / 1e12:.2f} TB/s")
    for name, num_bytes, works in lines:
        us = microseconds(works)
        rate = num_bytes / us * 1e6
        print(f"{name:<58}{us:9.2f} us {rate / 1e12:6.2f} TB/s {rate / ceiling:6.0%}", flush=True)


def matrices(num_tokens: int, num_features: int, count: int) -> list[Tensor]:
    return [torch.randn(num_tokens, num_features, device="cuda", dtype=torch.bfloat16) for _ in range(count)]


def norms(num_tokens: int) -> Iterator[tuple[str, int, list[Callable[[], Any]]]]:
    size = num_tokens * HIDDEN
    count = copies_for(6 * size)
    norm = Norm(torch.randn(HIDDEN, device="cuda", dtype=torch.bfloat16), 1e-6)
    pairs = list(zip(matrices(num_tokens, HIDDEN, count), matrices(num_tokens, HIDDEN, count), strict=True))
    yield (
        f"residual + norm, {num_tokens} x {HIDDEN}",
        8 * size,
        [functools.partial(norm_kernel.launch, *pair, norm) for pair in pairs],
    )
    for code_dtype in (torch.int8, torch.float8_e4m3fn):
        for group in (0, 128):
            yield (
                f"residual + norm + {code_dtype} by {group or 'token'}, {num_tokens} x {HIDDEN}",
                7 * size,
                [
                    functools.partial(norm_kernel.launch_codes, *pair, norm, Codes(code_dtype, group))
                    for pair in pairs
                ],
            )
    yield (
        f"quantize to int8, {num_tokens} x {HIDDEN}",
        3 * size,
        [functools.partial(row_codes_kernel.launch, x, Codes(torch.int8)) for x, _ in pairs],
    )
    yield (
        f"Hadamard 128, {num_tokens} x {HIDDEN}",
        4 * size,
        [functools.partial(hadamard_kernel.launch, x, 128) for x, _ in pairs],
    )


def activations(num_tokens: int) -> Iterator[tuple[str, int, list[Callable[[], Any]]]]:
    size = num_tokens * INNER
    operands = matrices(num_tokens, 2 * INNER, copies_for(4 * size))
    yield (
        f"SiLU · up, {num_tokens} x {INNER}",
        6 * size,
        [functools.partial(silu_kernel.launch, x, "silu") for x in operands],
    )
    for code_dtype, group in ((torch.int8, 0), (torch.float8_e4m3fn, 0), (torch.float8_e4m3fn, 128)):
        yield (
            f"SiLU · up + {code_dtype} by {group or 'token'}, {num_tokens} x {INNER}",
            5 * size,
            [
                functools.partial(silu_kernel.launch_codes, x, "silu", Codes(code_dtype, group))
                for x in operands
            ],
        )


def rotations(num_tokens: int) -> Iterator[tuple[str, int, list[Callable[[], Any]]]]:
    width = (QUERIES + 2 * HEADS) * DIM
    operands = matrices(num_tokens, width, copies_for(2 * width * num_tokens))
    turn = torch.arange(8192)[:, None] / 5e5 ** (torch.arange(DIM // 2) / (DIM // 2))
    angles = turn.cos().cuda(), turn.sin().cuda()
    positions = torch.randint(0, 8192, (num_tokens,), device="cuda")
    num_blocks = max(2 * num_tokens, 16384) // 16
    slots = torch.randperm(num_blocks * 16, device="cuda")[:num_tokens]
    weight = torch.ones(DIM, device="cuda", dtype=torch.bfloat16)
    shape = (num_blocks, HEADS, 16, DIM)
    for name, dtype, scale_shape, weights in (
        ("bf16", torch.bfloat16, None, (None, None)),
        ("bf16, q and k normed", torch.bfloat16, None, (weight, weight)),
        ("fp8 per head", torch.float8_e4m3fn, (HEADS,), (None, None)),
        ("int8 per token and head", torch.int8, shape[:3], (None, None)),
    ):
        pages = [torch.zeros(shape, device="cuda", dtype=dtype) for _ in range(2)]
        scales = [None if scale_shape is None else torch.ones(scale_shape, device="cuda") for _ in range(2)]
        moved = num_tokens * (2 * width + DIM * (2 * QUERIES + 2 * HEADS * dtype.itemsize))
        arguments = (positions, *angles, slots, *weights, 1e-6, False, *pages, *scales)
        yield (
            f"RoPE + append, {name}, {num_tokens} tokens",
            moved,
            [functools.partial(rope_kernel.launch, Append(x, *arguments)) for x in operands],
        )


def rows_of_a_table(num_tokens: int) -> Iterator[tuple[str, int, list[Callable[[], Any]]]]:
    ids = [torch.randint(0, VOCAB, (num_tokens,), device="cuda") for _ in range(4)]
    packed = torch.randint(-(2**31), 2**31, (VOCAB, HIDDEN // 8), device="cuda", dtype=torch.int32)
    scale = torch.rand(VOCAB, HIDDEN // 128, device="cuda").bfloat16()
    yield (
        f"INT4 embedding, {num_tokens} x {HIDDEN}",
        num_tokens * HIDDEN * 5 // 2,
        [functools.partial(embedding_kernel.launch, each, packed, scale, HIDDEN, 4, 1.0) for each in ids],
    )


def choices(num_rows: int) -> Iterator[tuple[str, int, list[Callable[[], Any]]]]:
    operands = [
        torch.randn(num_rows, VOCAB, device="cuda").bfloat16().float()
        for _ in range(copies_for(4 * num_rows * VOCAB))
    ]
    size = operands[0].nbytes
    yield (
        f"argmax, {num_rows} x {VOCAB}",
        size,
        [functools.partial(sampling_kernel.launch_argmax, x) for x in operands],
    )
    yield (
        f"argmax of torch, {num_rows} x {VOCAB}",
        size,
        [functools.partial(torch.argmax, x, dim=1) for x in operands],
    )
    for kept in (20, 64):
        yield (
            f"top {kept}, {num_rows} x {VOCAB}",
            size,
            [functools.partial(sampling_kernel.launch_topk, x, kept) for x in operands],
        )
    yield (
        f"top 64 of torch, {num_rows} x {VOCAB}",
        size,
        [functools.partial(torch.topk, x, 64, dim=1) for x in operands[:16]],
    )


def main() -> None:
    torch.manual_seed(0)
    parts = [
        (part, count) for part in (norms, activations, rotations, rows_of_a_table) for count in (1, 64, 4096)
    ]
    parts += [(choices, count) for count in (1, 16, 64, 256)]
    table(line for part, count in parts for line in part(count))


if __name__ == "__main__":
    main()
