"""Moments of columns in plain torch: what the operator means on a CPU."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: it comes with CUDA builds of torch")

from quantkit_kernels.moments import Moments, column_moments


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_on_a_cpu(dtype):
    x_TK = torch.randn(37, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    got, exact_TK = Moments(*column_moments(x_TK)), x_TK.double()
    bound_K = 37 * torch.finfo(torch.float32).eps * exact_TK.abs().sum(dim=0)
    assert ((got.sum_K - exact_TK.sum(dim=0)).abs() <= bound_K).all()
    assert ((got.abs_K - exact_TK.abs().sum(dim=0)).abs() <= bound_K).all()
    assert torch.allclose(got.square_K.double(), exact_TK.square().sum(dim=0), rtol=1e-5)
    assert torch.equal(got.max_K, x_TK.float().abs().amax(dim=0))


def test_nan_is_in_all_four():
    x_TK = torch.ones(3, 2)
    x_TK[1, 0] = torch.nan
    assert column_moments(x_TK).isnan().tolist() == [[True, False]] * 4
    assert torch.library.opcheck(column_moments, (x_TK,), test_utils=("test_schema", "test_faketensor"))
