"""SmoothQuant balances inputs against weights and changes no product."""

import pytest
import torch

from quantkit.algorithms.smoothquant import smoothquant_scale
from quantkit.numerics import affine
from quantkit.schemes import IntSpec, PerChannel
from quantkit.schemes.tiles import dequantize_weight, minmax_qparams, quantize_weight
from tests.unit.algorithms.correlated import inputs, weights


def w8a8(x_TK: torch.Tensor, w_NK: torch.Tensor) -> torch.Tensor:
    """The product with weights and (per token) inputs in INT8."""
    spec = IntSpec(bits=8, granularity=PerChannel())
    qparams = minmax_qparams(w_NK, spec, torch.float32)
    w_hat_NK = dequantize_weight(quantize_weight(w_NK, spec, qparams), spec.granularity, qparams)
    scale = affine.choose_symmetric(x_TK, 127.5)
    return affine.dequantize(affine.quantize_int(x_TK, scale, None, -128, 127), scale) @ w_hat_NK.T


def test_half_makes_inputs_and_weights_equally_large():
    x_TK, linears = inputs(200, 64), [weights(20, 64), weights(8, 64, seed=1)]
    scale_K = smoothquant_scale(x_TK.abs().amax(0), linears, 0.5)
    of_inputs = (x_TK / scale_K).abs().amax(0)
    of_weights = torch.cat(linears).mul(scale_K).abs().amax(0)
    torch.testing.assert_close(of_inputs, of_weights)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_ends_flatten_one_side(alpha):
    x_TK, w_NK = inputs(200, 64), weights(20, 64)
    scale_K = smoothquant_scale(x_TK.abs().amax(0), [w_NK], alpha)
    flat = (x_TK / scale_K).abs().amax(0) if alpha else (w_NK * scale_K).abs().amax(0)
    torch.testing.assert_close(flat, torch.ones(64))


def test_int8_products_get_better_where_inputs_have_large_channels():
    x_TK, w_NK = inputs(200, 64), weights(40, 64)
    x_TK[:, 7] *= 30
    scale_K = smoothquant_scale(x_TK.abs().amax(0), [w_NK])
    exact = x_TK @ w_NK.T
    torch.testing.assert_close((x_TK / scale_K) @ (w_NK * scale_K).T, exact, rtol=1e-4, atol=1e-3)
    before = (w8a8(x_TK, w_NK) - exact).square().mean()
    after = (w8a8(x_TK / scale_K, w_NK * scale_K) - exact).square().mean()
    assert after < before / 2


def test_channels_without_inputs_or_weights_stay():
    absmax_K, w_NK = torch.tensor([0.0, 2.0, 3.0]), torch.tensor([[1.0, 0.0, 4.0]])
    scale_K = smoothquant_scale(absmax_K, [w_NK])
    assert scale_K[:2].tolist() == [1.0, 1.0]
    assert scale_K[2].item() == pytest.approx((3 / 4) ** 0.5)
