"""Products whose rows no batch changes, on a CPU."""

import pytest
import torch

from quantkit_kernels import strip_weight, w4a8, w8a8_fp8, w8a8_int8, weight_only
from quantkit_kernels.batch_invariant import FIXED_ROWS, in_fixed_rows
from quantkit_kernels.weight import LinearWeight

N, K, M = 70, 300, 2 * FIXED_ROWS + 6
PARTS = [slice(0, 1), slice(41, 42), slice(3, 20), slice(30, 65), slice(69, 70), slice(0, M)]


def codes(rows, cols, dtype, limit=128):
    draw = torch.Generator().manual_seed(rows)
    return torch.randint(-limit, limit, (rows, cols), dtype=torch.int8, generator=draw).to(dtype)


def scales(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.1


def int4():
    return strip_weight.prepare(LinearWeight(codes(N, K, torch.int8, 8), scales(N, 3), None, (1, 128), 4))


def product_of_fp8(tile):
    grid = (-(-N // tile[0]), -(-K // tile[1]))
    weight = w8a8_fp8.prepare(LinearWeight(codes(N, K, torch.float8_e4m3fn), scales(*grid), None, tile, 8))
    x, scale = codes(M, K, torch.float8_e4m3fn), scales(M, grid[1])
    return lambda rows: w8a8_fp8.multiply(
        x[rows], scale[rows], weight, None, torch.float32, batch_invariant=True
    )


def product_of_int8():
    weight = w8a8_int8.prepare(LinearWeight(codes(N, K, torch.int8), scales(N, 1), None, (1, K), 8))
    x, scale = codes(M, K, torch.int8), scales(M, 1)
    return lambda rows: w8a8_int8.multiply(
        x[rows], scale[rows], None, weight, None, torch.float32, batch_invariant=True
    )


def product_of_w4a8():
    weight, x, scale = int4(), codes(M, K, torch.int8), scales(M, 1)
    return lambda rows: w4a8.multiply(
        x[rows], scale[rows], None, weight, None, torch.float32, batch_invariant=True
    )


def product_of_16_bits():
    weight, x = int4(), scales(M, K).bfloat16()
    return lambda rows: weight_only.multiply(x[rows], weight, batch_invariant=True)


@pytest.mark.parametrize(
    "product",
    [lambda: product_of_fp8((1, K)), lambda: product_of_fp8((128, 128)), product_of_int8, product_of_w4a8,
     product_of_16_bits],
    ids=["fp8", "fp8 in blocks", "int8", "w4a8", "w4a16"],
)  # fmt: skip
def test_a_row_by_itself_is_the_row_of_a_batch(product):
    run = product()
    together = run(slice(0, M))
    for rows in PARTS:
        assert torch.equal(run(rows), together[rows])


def test_one_scale_for_all_rows_is_theirs():
    weight = w8a8_fp8.prepare(LinearWeight(codes(N, K, torch.float8_e4m3fn), scales(1, 1), None, (N, K), 8))
    x = codes(M, K, torch.float8_e4m3fn)
    one, each = (
        w8a8_fp8.multiply(x, scale, weight, None, torch.float32, batch_invariant=True)
        for scale in (torch.full((1,), 0.3), torch.full((M, 1), 0.3))
    )
    assert torch.equal(one, each)


def test_every_call_has_as_many_rows_and_no_row_is_lost():
    seen = []

    def run(x, scale):
        seen.append((x.shape, scale.shape, x.is_contiguous()))
        return x * scale

    for num_rows in (1, FIXED_ROWS, FIXED_ROWS + 1, M):
        x, scale = torch.rand(num_rows, 10)[:, :4], torch.rand(num_rows, 1)
        assert torch.equal(in_fixed_rows(run, x, scale), x * scale)
    assert set(seen) == {((FIXED_ROWS, 4), (FIXED_ROWS, 1), True)}
