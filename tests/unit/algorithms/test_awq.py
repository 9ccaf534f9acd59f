"""AWQ's scales lower the output error, and change no product."""

import pytest
import torch

from quantkit.algorithms.awq import awq_scale, scale_at
from quantkit.algorithms.rounded import output_loss
from quantkit.algorithms.rtn import rtn
from quantkit.schemes import IntSpec, PerChannel, PerGroup
from quantkit.schemes.tiles import dequantize_weight
from tests.unit.algorithms.correlated import inputs, weights

SPECS = [IntSpec(bits=4, granularity=PerGroup(32)), IntSpec(bits=3, granularity=PerChannel())]


def loss(w_NK, scale_K, hessian_KK, spec) -> float:
    importance_K = hessian_KK.diagonal() / scale_K**2
    codes_NK, qparams = rtn(
        w_NK * scale_K, spec, torch.bfloat16, scales="importance", importance_K=importance_K
    )
    w_hat_NK = dequantize_weight(codes_NK, spec.granularity, qparams) / scale_K
    return output_loss(w_NK - w_hat_NK, hessian_KK) * len(w_NK)


@pytest.mark.parametrize("spec", SPECS, ids=["int4 group", "int3 channel"])
def test_outputs_get_better_where_some_inputs_are_large(spec):
    x_TK, linears = inputs(400, 96), [weights(40, 96), weights(12, 96, seed=1)]
    x_TK[:, [3, 50]] *= 20
    hessian_KK, absmean_K = x_TK.T @ x_TK / 400, x_TK.abs().mean(0)
    scale_K = awq_scale(linears, absmean_K, hessian_KK, spec, torch.bfloat16)
    ones_K = torch.ones(96)
    before = sum(loss(w_NK, ones_K, hessian_KK, spec) for w_NK in linears)
    after = sum(loss(w_NK, scale_K, hessian_KK, spec) for w_NK in linears)
    assert after < 0.9 * before
    assert scale_K.dtype == torch.float32
    assert (scale_K[[3, 50]] > scale_K.median()).all()


def test_it_is_the_best_point_of_its_grid():
    spec, w_NK, x_TK = SPECS[0], weights(24, 64), inputs(300, 64)
    hessian_KK, absmean_K = x_TK.T @ x_TK / 300, x_TK.abs().mean(0)
    scale_K = awq_scale([w_NK], absmean_K, hessian_KK, spec, torch.bfloat16, num_ratios=5)
    ours = loss(w_NK, scale_K, hessian_KK, spec)
    for step in range(6):
        assert ours <= loss(w_NK, scale_at(absmean_K, step / 5), hessian_KK, spec)


def test_points_are_normalised_and_ratio_0_changes_nothing():
    absmean_K = torch.tensor([0.1, 4.0, 0.7])
    assert torch.equal(scale_at(absmean_K, 0.0), torch.ones(3))
    scale_K = scale_at(absmean_K, 0.6)
    assert (scale_K.max() * scale_K.min()).item() == pytest.approx(1, rel=1e-6)


def test_channels_that_never_fired_count_as_the_smallest():
    scale_K = scale_at(torch.tensor([0.0, 0.5, 2.0]), 0.5)
    assert scale_K[0] == scale_K[1]
    assert torch.equal(scale_at(torch.zeros(3), 0.5), torch.ones(3))
