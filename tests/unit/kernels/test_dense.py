"""The dense product against float64, with and without the detour over float32."""

import pytest
import torch

from quantkit_kernels import dense


@pytest.mark.parametrize("has_units", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs"), [(1, 5, 7), (15, 64, 96), (16, 3000, 640), (33, 1, 1)]
)
def test_it_is_the_product(monkeypatch, has_units, with_bias, dtype, rows, outputs, inputs):
    monkeypatch.setattr(dense, "has_bf16_units", lambda: has_units)
    generator = torch.Generator().manual_seed(0)
    x_MK, w_NK = (torch.randn(size, inputs, generator=generator).to(dtype) for size in (rows, outputs))
    bias_N = torch.randn(outputs, generator=generator).to(dtype) if with_bias else None
    exact = torch.nn.functional.linear(
        x_MK.double(), w_NK.double(), None if bias_N is None else bias_N.double()
    )
    got = dense.linear(x_MK, w_NK, bias_N)
    assert got.dtype == dtype
    # partial sums are about sqrt(K) and each of K additions rounds one; then the result is rounded to its dtype, and
    # once before where the bias is added by itself
    atol = 2 * torch.finfo(torch.float32).eps * inputs + 2 * torch.finfo(dtype).eps * inputs**0.5
    torch.testing.assert_close(got.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=atol)


def test_bf16_without_units_is_as_exact_as_float32_rounded_once(monkeypatch):
    monkeypatch.setattr(dense, "has_bf16_units", lambda: False)
    generator = torch.Generator().manual_seed(1)
    x_MK, w_NK = (torch.randn(size, 512, generator=generator).bfloat16() for size in (40, 70))
    expected = (x_MK.float() @ w_NK.float().T).bfloat16()
    torch.testing.assert_close(dense.linear(x_MK, w_NK), expected, rtol=2**-8, atol=2**-8)


def test_rows_of_a_view_are_taken_as_they_are(monkeypatch):
    monkeypatch.setattr(dense, "has_bf16_units", lambda: False)
    x_MK = torch.randn(64, 40).bfloat16()[::2, 4:]
    w_NK = torch.randn(36, 50).bfloat16().T
    expected = (x_MK.double() @ w_NK.double().T).bfloat16()
    torch.testing.assert_close(dense.linear(x_MK, w_NK), expected, rtol=2**-7, atol=2**-6)
