"""No rows are no work: what a CPU computes of none has the shape and dtype of its definition."""

import pytest
import torch

from quantkit_kernels import catalog, embedding, hadamard, norm_quant, rope_append, row_codes, silu_quant
from quantkit_kernels.weight import LinearWeight

N, K = 32, 128
BF16 = torch.bfloat16
CONTIGUOUS = torch.empty(0, K, dtype=BF16)
WIDE, GAPS = torch.empty(4, 2 * K, dtype=BF16)[:0, :K], torch.empty(4, 2 * K, dtype=BF16)[:0, ::2]
CODES = [(torch.int8, 0), (torch.int8, 32), (torch.float8_e4m3fn, 0)]


@pytest.mark.parametrize("x", [CONTIGUOUS, GAPS], ids=["contiguous", "with gaps"])
@pytest.mark.parametrize(("bits", "asymmetric"), [(4, False), (4, True), (8, False), (8, True), (2, False)])
@pytest.mark.parametrize("cols", [32, K])
def test_products_of_no_rows(x, bits, asymmetric, cols):
    zero = torch.ones(N, K // cols, dtype=torch.int8) if asymmetric else None
    weight = LinearWeight(
        torch.zeros(N, K, dtype=torch.int8), torch.ones(N, K // cols), zero, (1, cols), bits
    )
    for kernel in catalog.choose_float(weight, BF16):
        y = kernel.run(x, kernel.prepare(weight, BF16))
        assert y.shape == (0, N) and y.dtype == BF16


def test_an_integer_product_of_no_rows():
    weight = LinearWeight(torch.zeros(N, K, dtype=torch.int8), torch.ones(N, 1), None, (1, K), 8)
    (kernel,) = catalog.INT8_INPUT
    codes = torch.empty(0, K, dtype=torch.int8)
    y = kernel.run(codes, torch.ones(0, 1), torch.ones(1, dtype=torch.int8), kernel.prepare(weight, BF16))
    assert y.shape == (0, N) and y.dtype == torch.float32


@pytest.mark.parametrize("x", [CONTIGUOUS, WIDE], ids=["contiguous", "of a wider matrix"])
@pytest.mark.parametrize(("dtype", "group"), CODES)
def test_codes_of_no_rows(x, dtype, group):
    weight = torch.ones(K, dtype=BF16)
    for codes, scale in (
        row_codes.quantize_rows(x, dtype, group, None, None),
        norm_quant.rms_norm_codes(x, None, weight, 1e-6, False, None, dtype, group, None, None),
    ):
        assert (
            codes.shape == (0, K) and codes.dtype == dtype and scale.shape == (0, K // group if group else 1)
        )
    codes, _ = silu_quant.gated_activation_codes(x, "silu", dtype, group, None, None)
    assert codes.shape == (0, K // 2)


def test_values_of_no_rows():
    x = CONTIGUOUS
    assert norm_quant.rms_norm(x, x.clone(), torch.ones(K, dtype=BF16), 1e-6, False, None).shape == (0, K)
    assert silu_quant.gated_activation(x, "silu").shape == (0, K // 2)
    assert hadamard.hadamard(x, 64).shape == (0, K)
    ids, packed, scale = (
        torch.empty(0, dtype=torch.int64),
        torch.zeros(4, 8, dtype=torch.int32),
        torch.ones(4, 2),
    )
    assert embedding.embed_packed(ids, packed, scale, 64, 4, 1.0).shape == (0, 64)


@pytest.mark.parametrize("weight", [None, torch.ones(64, dtype=BF16)], ids=["plain", "normed"])
def test_no_tokens_are_rotated(weight):
    pages = torch.zeros(2, 1, 16, 64, dtype=BF16)
    qkv, none = torch.empty(0, 4 * 64, dtype=BF16), torch.empty(0, dtype=torch.int64)
    angles = torch.ones(4, 32)
    q = rope_append.rope_append(
        qkv, none, angles, angles, none, weight, weight, 1e-6, False, pages, pages.clone(), None, None
    )
    assert q.shape == (0, 2, 64) and q.dtype == BF16
