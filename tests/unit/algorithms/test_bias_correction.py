"""The corrected bias removes the mean error of the output."""

import torch

from quantkit.algorithms.bias_correction import bias_correction
from quantkit.algorithms.rtn import rtn
from quantkit.schemes import IntSpec, PerGroup
from quantkit.schemes.tiles import dequantize_weight
from tests.unit.algorithms.correlated import inputs, weights


def test_outputs_have_their_mean_again():
    spec, w_NK = IntSpec(bits=2, granularity=PerGroup(32)), weights(20, 64)
    x_TK = inputs(500, 64) + 1.5
    result = rtn(w_NK, spec, torch.bfloat16)
    w_hat_NK = dequantize_weight(result.codes_NK, spec.granularity, result.qparams)
    bias_N = bias_correction(w_NK.bfloat16(), w_hat_NK, x_TK.mean(dim=0))
    exact_N = ((w_NK.bfloat16().double() - w_hat_NK.double()) @ x_TK.double().T).mean(dim=1)
    torch.testing.assert_close(bias_N.double(), exact_N, rtol=1e-4, atol=1e-4)
    error_TN = x_TK @ (w_NK - w_hat_NK).T
    assert (error_TN - bias_N).square().mean() < error_TN.square().mean()


def test_an_exact_weight_needs_no_bias():
    w_NK = weights(4, 8)
    assert (bias_correction(w_NK, w_NK, torch.ones(8)) == 0).all()
