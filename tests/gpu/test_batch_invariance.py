"""What a row comes to does not depend on the rows beside it, to the bit, where the mode asks for it."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: it comes with CUDA builds of torch")

from quantkit.bench.contenders import random_input
from quantkit_kernels import (
    attention_decode,
    hadamard_kernel,
    moe,
    moe_routing,
    norm_kernel,
    paged_operators,
    row_codes_kernel,
    silu_kernel,
    w4a8,
    w8a8_fp8,
    w8a8_int8,
)
from quantkit_kernels import weight_only as wo
from quantkit_kernels.catalog import BLOCK, CHANNEL, TENSOR
from quantkit_kernels.norm_quant import Norm
from quantkit_kernels.paged_kv import Pages
from quantkit_kernels.row_codes import Codes
from tests.gpu.attention_cases import Case, build
from tests.gpu.test_families import random_operand
from tests.gpu.test_moe import random_experts, random_ids
from tests.gpu.triton_device import generator, poisoned  # noqa: F401

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.usefixtures("poisoned"),
]
BF16, FP16, FP8, INT8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8
SIZES = (1, 1, 1, 2, 3, 8, 9, 16, 17, 31, 32, 33, 64, 65, 100, 128, 129, 200, 257, 300)
FIRST = [
    37 * i % (301 - size) for i, size in enumerate(SIZES)
]  # at other places of a tile than by themselves
PARTS = [slice(first, first + size) for first, size in zip(FIRST, SIZES, strict=True)]
GROUP = (1, 128)
WEIGHT_ONLY = [(4, INT8, GROUP, BF16), (4, INT8, CHANNEL, FP16), (8, INT8, GROUP, BF16), (8, FP8, CHANNEL, BF16),
               (8, FP8, BLOCK, FP16), (16, BF16, TENSOR, BF16)]  # fmt: skip
SHAPES = [(1000, 640), (4096, 1024)]  # tiles that are cut where rows are few, in the usual mode


def assert_invariant(run, *per_row):
    """run(rows of each) is the rows of run(all)."""
    together = run(*per_row)
    for rows in PARTS:
        alone = run(*(tensor[rows] for tensor in per_row))
        assert torch.equal(alone, together[rows]), f"rows {rows.start} to {rows.stop} of {len(together)}"


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize(("bits", "codes", "tile", "dtype"), WEIGHT_ONLY)
def test_16_bit_inputs(bits, codes, tile, dtype, n, k):
    torch.manual_seed(0)
    operand, _ = random_operand(wo.OF_BITS[bits], bits, codes, tile, False, (n, k))
    x = torch.randn(300, k, dtype=dtype, device="cuda")
    bias = torch.randn(n, dtype=dtype, device="cuda")
    assert_invariant(lambda rows: wo.multiply(rows, operand, bias, batch_invariant=True), x)


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("tile", [CHANNEL, BLOCK])
def test_fp8_inputs(tile, n, k):
    torch.manual_seed(0)
    operand, _ = random_operand(w8a8_fp8.FAMILY, 8, FP8, tile, False, (n, k))
    x, more = random_input(FP8, 300, k, torch.device("cuda"), in_blocks=tile == BLOCK)
    assert_invariant(
        lambda rows, scale: w8a8_fp8.multiply(rows, scale, operand, None, BF16, batch_invariant=True),
        x, more["x_scale"],
    )  # fmt: skip


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("with_zero", [False, True])
def test_int8_inputs(with_zero, n, k):
    torch.manual_seed(0)
    operand, _ = random_operand(w8a8_int8.FAMILY, 8, INT8, CHANNEL, False, (n, k))
    x, more = random_input(INT8, 300, k, torch.device("cuda"))
    zero = torch.randint(-128, 128, (300, 1), dtype=INT8, device="cuda")
    bias = torch.randn(n, device="cuda")

    def run(rows, scale, zero):
        zero = zero if with_zero else None
        return w8a8_int8.multiply(rows, scale, zero, operand, bias, FP16, batch_invariant=True)

    assert_invariant(run, x, more["x_scale"], zero)


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("dtype", [INT8, FP8])
@pytest.mark.parametrize(
    ("tile", "with_zero"), [(GROUP, False), (GROUP, True), ((1, 32), False), (CHANNEL, False)]
)
def test_int4_weights_with_8_bit_inputs(tile, with_zero, dtype, n, k):
    torch.manual_seed(0)
    operand, _ = random_operand(w4a8.INT8_INPUT, 4, INT8, tile, with_zero, (n, k))
    x, more = random_input(dtype, 300, k, torch.device("cuda"))
    assert_invariant(
        lambda rows, scale: w4a8.multiply(rows, scale, None, operand, None, BF16, batch_invariant=True),
        x, more["x_scale"],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "x_dtype", "group"), [("int4", BF16, 128), ("fp8", BF16, 0), ("fp8", FP8, 128)]
)
def test_experts(kind, x_dtype, group):
    """A token's sum over its experts, however many others are with the same ones."""
    n, k = 384, 512
    weight, _ = random_experts(8, n, k, kind, group=group)
    ids, gates = random_ids(300, 2, 8), torch.rand(300, 2, generator=generator(4)).cuda()
    x = torch.randn(300, k, generator=generator(3)).cuda().to(x_dtype)
    scale = torch.rand(300, 4, generator=generator(5)).cuda()

    def run(rows, scale, ids, gates):
        num_pairs = ids.numel()
        tile_rows = moe.rows_for(num_pairs, weight, batch_invariant=True)
        routed = moe_routing.sort_by_expert(ids.contiguous(), 8, tile_rows)
        scale = scale if x_dtype == FP8 else None
        y = moe.multiply(rows, scale, weight, *routed, num_pairs, BF16)
        return moe_routing.combine(y, gates.contiguous(), BF16)

    assert_invariant(run, x, scale, ids, gates)


STORED = {
    "bf16": {"dtype": BF16},
    "e4m3": {"dtype": FP8},
    "int8 per token": {"dtype": INT8, "per_token": True},
}


@pytest.mark.parametrize("stored", STORED.values(), ids=STORED)
@pytest.mark.parametrize("window", [0, 300])
@pytest.mark.parametrize("num_queries", [8, 14])
def test_decode_of_a_sequence(num_queries, window, stored):
    """Alone, and among sequences of any length that have more new tokens than it has."""
    case = Case(
        lengths=(3000, 130, 1, 64, 1025, 700), q_lens=(1, 2, 1, 16, 4, 1), num_queries=num_queries, window=window,
        **stored,
    )  # fmt: skip
    split = attention_decode.INVARIANT_SPLIT
    assert_sequences_are_by_themselves(
        case, lambda *arguments: paged_operators.paged_decode(*arguments, split_tokens=split)
    )


@pytest.mark.parametrize("stored", STORED.values(), ids=STORED)
@pytest.mark.parametrize("window", [0, 300])
def test_prefill_of_a_sequence(window, stored):
    case = Case(
        lengths=(3000, 130, 1, 64, 1025, 700), q_lens=(1, 130, 1, 16, 400, 257), window=window, **stored
    )
    assert_sequences_are_by_themselves(case, paged_operators.paged_prefill)


def assert_sequences_are_by_themselves(case, run):
    q_TQD, pool, pages = build(case, "cuda")
    together = run(q_TQD, pool, pages, case.masking())
    bounds = pages.cu_seqlens_q.tolist()
    for i, length in enumerate(case.lengths):
        rows, one = slice(bounds[i], bounds[i + 1]), slice(i, i + 1)
        q_len = rows.stop - rows.start
        offsets = torch.tensor([0, q_len], dtype=torch.int32, device="cuda")
        alone = Pages(pages.block_table_BL[one], pages.lengths_B[one], offsets, q_len, length)
        assert torch.equal(run(q_TQD[rows], pool, alone, case.masking()), together[rows]), f"sequence {i}"


def as_bytes(results):
    return [each.view(INT8) if each.itemsize == 1 else each for each in results]


@pytest.mark.parametrize("width", [576, 4096, 14336])
def test_what_stands_between_the_products(width):
    """In no mode: norms, activations, codes and rotations of a row are its own."""
    draw = generator(width)
    x, up = (torch.randn(300, size, generator=draw).to(BF16).cuda() for size in (width, 2 * width))
    norm = Norm(torch.randn(width, generator=draw).to(BF16).cuda(), 1e-6)
    runs = [lambda x, _: [norm_kernel.launch(x.clone(), x.clone(), norm)],
            lambda _, up: [silu_kernel.launch(up, "silu")]]  # fmt: skip
    for codes in (Codes(INT8), Codes(FP8), Codes(FP8, 64)):
        runs += [
            lambda x, _, codes=codes: norm_kernel.launch_codes(x.clone(), x.clone(), norm, codes),
            lambda _, up, codes=codes: silu_kernel.launch_codes(up, "silu", codes),
            lambda x, _, codes=codes: row_codes_kernel.launch(x, codes),
        ]
    if width % 64 == 0:
        runs.append(lambda x, _: [hadamard_kernel.launch(x, 64)])
    for run in runs:
        together = as_bytes(run(x, up))
        for rows in PARTS:
            alone = as_bytes(run(x[rows], up[rows]))
            assert all(torch.equal(a, b[rows]) for a, b in zip(alone, together, strict=True))
