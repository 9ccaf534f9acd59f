"""GPTQ against round-to-nearest, against a naive float64 version of itself, and at its edges."""

import pytest
import torch
from torch import Tensor

from quantkit.algorithms.factor import factorize
from quantkit.algorithms.gptq import gptq, gptq_codes
from quantkit.algorithms.rounded import output_loss
from quantkit.algorithms.rtn import rtn
from quantkit.algorithms.scale_search import search_qparams
from quantkit.errors import CalibrationError
from quantkit.schemes import FloatSpec, IntSpec, PerBlock, PerChannel, PerGroup, PerTensor, QParams, Spec
from quantkit.schemes.tiles import dequantize_weight, expand_to_weight, minmax_qparams, quantize_weight
from tests.unit.algorithms.correlated import hessian, weights

SPECS = {
    "int4 group": IntSpec(bits=4, granularity=PerGroup(32)),
    "int4 asymmetric": IntSpec(bits=4, granularity=PerGroup(32), symmetric=False),
    "int4 channel": IntSpec(bits=4, granularity=PerChannel()),
    "int2": IntSpec(bits=2, granularity=PerGroup(64)),
    "int8": IntSpec(bits=8, granularity=PerChannel()),
    "int8 tensor": IntSpec(bits=8, granularity=PerTensor()),
    "fp8": FloatSpec(granularity=PerChannel()),
    "fp8 tensor": FloatSpec(granularity=PerTensor()),
    "fp8 block": FloatSpec(granularity=PerBlock(128, 128)),
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def dequantized(codes_NK: Tensor, spec: Spec, qparams: QParams) -> Tensor:
    return dequantize_weight(codes_NK, spec.granularity, qparams)


def by_inverse(w_NK: Tensor, hessian_KK: Tensor, spec: Spec, qparams: QParams, damping: float) -> Tensor:
    """The paper's algorithm in float64, column by column, with the inverse of H; codes [N, K]."""
    order = torch.argsort(hessian_KK.diagonal(), descending=True, stable=True)
    damped = hessian_KK.double()[order][:, order]
    damped.diagonal().add_(damping * damped.diagonal().mean())
    left = w_NK.double()[:, order]
    shape = (w_NK.shape[0], w_NK.shape[1])
    scale = expand_to_weight(qparams.scale.double(), spec.granularity, *shape)[:, order]
    codes = torch.empty_like(left)
    for column in range(len(order)):
        inverse = torch.linalg.inv(damped[column:, column:])
        value = left[:, column] / scale[:, column]
        if isinstance(spec, FloatSpec):
            codes[:, column] = value.clamp(-448, 448).float().to(torch.float8_e4m3fn).double()
        else:
            codes[:, column] = value.round().clamp(spec.qmin, spec.qmax)
        error = (left[:, column] - codes[:, column] * scale[:, column]) / inverse[0, 0]
        left[:, column:] -= error[:, None] * inverse[0]
    restored = torch.empty_like(codes)
    restored[:, order] = codes
    return restored


@every_spec
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
def test_it_is_rtn_when_inputs_are_uncorrelated(spec, scale_dtype):
    w_NK = weights(40, 192)
    nearest = rtn(w_NK, spec, scale_dtype, scales="mse")
    ours = gptq(w_NK, torch.eye(192), spec, scale_dtype, scales="mse")
    assert torch.equal(ours.codes_NK.float(), nearest.codes_NK.float())
    assert ours.codes_NK.dtype == nearest.codes_NK.dtype
    assert torch.equal(ours.qparams.scale, nearest.qparams.scale)
    assert ours.fallback is None


@every_spec
def test_it_beats_rtn_on_its_own_objective(spec):
    w_NK, hessian_KK = weights(40, 192), hessian(192)
    nearest = rtn(w_NK, spec, torch.bfloat16, importance_K=hessian_KK.diagonal())
    ours = gptq(w_NK, hessian_KK, spec, torch.bfloat16, scales=nearest.qparams)
    theirs = output_loss(w_NK - dequantized(nearest.codes_NK, spec, nearest.qparams), hessian_KK)
    assert ours.loss < 0.9 * theirs


@pytest.mark.parametrize("name", ["int4 group", "int4 asymmetric", "int4 channel"])
def test_scales_for_what_cannot_be_made_up_for_beat_those_of_rtn(name):
    spec, w_NK, hessian_KK = SPECS[name], weights(40, 192), hessian(192)
    for_rtn = search_qparams(w_NK, spec, torch.bfloat16, hessian_KK.diagonal())
    ours = gptq(w_NK, hessian_KK, spec, torch.bfloat16)
    assert ours.loss < gptq(w_NK, hessian_KK, spec, torch.bfloat16, scales=for_rtn).loss


def test_importance_is_the_variance_that_later_columns_leave():
    hessian_KK = hessian(48)
    factor = factorize(hessian_KK)
    assert factor is not None
    damped = hessian_KK.double() + factor.damping * torch.eye(48)
    order = factor.order_K
    for place in (0, 17, 47):
        later = order[place + 1 :]
        column = order[place]
        explained = damped[column, later] @ torch.linalg.solve(damped[later][:, later], damped[later, column])
        expected = damped[column, column] - explained
        assert factor.importance_K[column].item() == pytest.approx(expected.item(), rel=1e-3)


@every_spec
def test_the_loss_is_the_mean_squared_error_of_the_output(spec):
    w_NK, hessian_KK = weights(40, 192), hessian(192)
    ours = gptq(w_NK, hessian_KK, spec, torch.bfloat16)
    error = (w_NK - dequantized(ours.codes_NK, spec, ours.qparams)).double()
    exact = torch.einsum("nk,kj,nj->n", error, hessian_KK.double(), error).mean().item()
    assert ours.loss == pytest.approx(exact, rel=1e-3)
    assert output_loss(error.float(), hessian_KK) == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("name", ["int4 group", "int4 channel", "int8", "fp8 block"])
def test_it_agrees_with_the_inverse_in_float64(name):
    spec = SPECS[name]
    w_NK, hessian_KK = weights(64, 160 if name != "int4 group" else 192), hessian(192)
    hessian_KK = hessian_KK[: w_NK.shape[1], : w_NK.shape[1]]
    ours = gptq(w_NK, hessian_KK, spec, torch.float32)
    expected = by_inverse(w_NK, hessian_KK, spec, ours.qparams, 0.01)
    # a tie that falls the other way in float32 changes its row from there on
    same_rows = (ours.codes_NK.double() == expected).all(dim=1).double().mean()
    assert same_rows >= 0.9


@every_spec
def test_rows_and_blocks_do_not_know_of_each_other(spec, monkeypatch):
    w_NK, hessian_KK = weights(40, 192), hessian(192)
    factor, qparams = factorize(hessian_KK), minmax_qparams(w_NK, spec, torch.bfloat16)
    assert factor is not None
    codes_NK, loss_N = gptq_codes(w_NK, factor, spec, qparams)
    monkeypatch.setattr("quantkit.algorithms.gptq.BLOCK_COLUMNS", 24)
    other_NK, other_N = gptq_codes(w_NK, factor, spec, qparams)
    assert (codes_NK.float() == other_NK.float()).float().mean() > 0.98
    torch.testing.assert_close(loss_N, other_N, rtol=0.1, atol=0)
    torch.testing.assert_close(loss_N.sum(), other_N.sum(), rtol=0.01, atol=0)


def test_linears_of_one_input_can_be_rounded_as_one():
    spec, hessian_KK = SPECS["int4 group"], hessian(192)
    factor = factorize(hessian_KK)
    assert factor is not None
    alone = [gptq(weights(rows, 192, seed=rows), factor, spec, torch.bfloat16) for rows in (40, 8, 8)]
    together_NK = torch.cat([weights(rows, 192, seed=rows) for rows in (40, 8, 8)])
    together = gptq(together_NK, factor, spec, torch.bfloat16)
    same = together.codes_NK == torch.cat([part.codes_NK for part in alone])
    assert same.float().mean() > 0.99
    assert torch.equal(together.qparams.scale, torch.cat([part.qparams.scale for part in alone]))


def test_the_order_of_rounding_leaves_the_layout_alone():
    """Permuting inputs and H permutes the codes and nothing else, although columns are rounded in another order."""
    spec, w_NK, hessian_KK = SPECS["int4 channel"], weights(40, 96), hessian(96)
    permutation = torch.randperm(96, generator=torch.Generator().manual_seed(1))
    straight = gptq(w_NK, hessian_KK, spec, torch.float32)
    permuted = gptq(w_NK[:, permutation], hessian_KK[permutation][:, permutation], spec, torch.float32)
    assert torch.equal(straight.qparams.scale, permuted.qparams.scale)
    assert (straight.codes_NK[:, permutation] == permuted.codes_NK).float().mean() > 0.98


def test_scales_belong_to_their_groups_in_the_weight():
    """Two groups of very different size: a scale that went with the wrong column would show."""
    spec = IntSpec(bits=8, granularity=PerGroup(32))
    w_NK = weights(16, 64)
    w_NK[:, 32:] *= 1000
    hessian_KK = hessian(64)
    hessian_KK[:32, 32:] = hessian_KK[32:, :32] = 0  # or the small ones make up for errors of the large ones
    assert set((torch.argsort(hessian_KK.diagonal())[:32] < 32).tolist()) == {True, False}, "rounded in turn"
    ours = gptq(w_NK, hessian_KK, spec, torch.float32, scales="minmax")
    assert torch.equal(ours.qparams.scale, minmax_qparams(w_NK, spec, torch.float32).scale)
    error = (w_NK - dequantized(ours.codes_NK, spec, ours.qparams)).abs()
    assert (error[:, :32] < 0.5).all()


def test_columns_that_never_fired_are_rounded_to_nearest_and_cost_nothing():
    spec, w_NK, hessian_KK = SPECS["int4 group"], weights(40, 192), hessian(192)
    dead = [0, 50, 191]
    hessian_KK[dead] = 0
    hessian_KK[:, dead] = 0
    ours = gptq(w_NK, hessian_KK, spec, torch.bfloat16)
    nearest = quantize_weight(w_NK, spec, ours.qparams)
    assert torch.equal(ours.codes_NK[:, dead], nearest[:, dead])
    shifted = w_NK.clone()
    shifted[:, dead] = 0
    same = gptq(shifted, hessian_KK, spec, torch.bfloat16, scales=ours.qparams)
    live = torch.ones(192, dtype=torch.bool)
    live[dead] = False
    assert torch.equal(ours.codes_NK[:, live], same.codes_NK[:, live])
    assert ours.loss == pytest.approx(same.loss, rel=1e-5)


def test_an_input_that_was_always_zero_means_rtn():
    spec, w_NK = SPECS["int4 group"], weights(8, 64)
    ours = gptq(w_NK, torch.zeros(64, 64), spec, torch.bfloat16, scales="mse")
    assert torch.equal(ours.codes_NK, rtn(w_NK, spec, torch.bfloat16).codes_NK)
    assert ours.loss == pytest.approx(0, abs=1e-6)


@every_spec
@pytest.mark.parametrize("shape", [(1, 64), (1, 128), (3, 192)])
def test_small_shapes(spec, shape):
    w_NK, hessian_KK = weights(*shape), hessian(shape[1])
    ours = gptq(w_NK, hessian_KK, spec, torch.bfloat16)
    assert ours.codes_NK.shape == shape
    assert torch.isfinite(dequantized(ours.codes_NK, spec, ours.qparams)).all()


def test_a_single_input_channel():
    spec = IntSpec(bits=4, granularity=PerChannel())
    w_NK = weights(6, 1)
    ours = gptq(w_NK, torch.tensor([[2.5]]), spec, torch.float32, scales="minmax")
    assert torch.equal(ours.codes_NK, rtn(w_NK, spec, torch.float32, scales="minmax").codes_NK)


def test_a_view_gives_what_its_copy_gives():
    spec, hessian_KK = SPECS["int4 group"], hessian(192)
    view = weights(192, 80).T[::2]
    ours = gptq(view, hessian_KK, spec, torch.bfloat16)
    copy = gptq(view.contiguous(), hessian_KK, spec, torch.bfloat16)
    assert torch.equal(ours.codes_NK, copy.codes_NK)
    assert ours.codes_NK.is_contiguous()


def test_weights_and_hessian_stay_as_they_are():
    w_NK, hessian_KK = weights(8, 64), hessian(64)
    before = w_NK.clone(), hessian_KK.clone()
    gptq(w_NK, hessian_KK, SPECS["int4 group"], torch.bfloat16)
    assert torch.equal(w_NK, before[0])
    assert torch.equal(hessian_KK, before[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_hessian_that_is_not_finite_is_refused(bad):
    hessian_KK = hessian(64)
    hessian_KK[3, 5] = bad
    with pytest.raises(CalibrationError, match="not finite"):
        gptq(weights(8, 64), hessian_KK, SPECS["int4 group"], torch.bfloat16)


def test_a_hessian_of_fewer_tokens_than_features_is_factorized():
    x_TK = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    assert gptq(weights(8, 64), x_TK.T @ x_TK / 3, SPECS["int4 group"], torch.bfloat16).fallback is None


def test_damping_grows_until_a_matrix_is_positive_definite():
    hessian_KK = hessian(64)
    size = hessian_KK.diagonal().mean()
    hessian_KK -= (torch.linalg.eigvalsh(hessian_KK)[0] + 0.05 * size) * torch.eye(64)
    factor = factorize(hessian_KK)
    assert factor is not None
    assert factor.damping == pytest.approx(0.1 * hessian_KK.diagonal().mean().item(), rel=1e-4)
    rebuilt = factor.upper_KK @ factor.upper_KK.T - factor.damping * torch.eye(64)
    reordered = hessian_KK[factor.order_K][:, factor.order_K]
    torch.testing.assert_close(rebuilt, reordered, rtol=0, atol=1e-5 * size.item())


def test_what_cannot_be_factorized_falls_back_and_says_so():
    spec, w_NK = SPECS["int4 group"], weights(8, 64)
    hopeless = torch.full((64, 64), -100.0)
    hopeless.diagonal().fill_(1.0)
    ours = gptq(w_NK, hopeless, spec, torch.bfloat16, scales="mse")
    assert torch.equal(ours.codes_NK, rtn(w_NK, spec, torch.bfloat16).codes_NK)
    assert ours.fallback is not None
    assert "positive definite" in ours.fallback


def test_the_rows_of_asymmetric_codes_stay_on_the_grid():
    spec, w_NK = SPECS["int4 asymmetric"], weights(40, 192) + 2
    ours = gptq(w_NK, hessian(192), spec, torch.bfloat16)
    assert ours.qparams.zero_point is not None
    assert (ours.codes_NK >= spec.qmin).all()
    assert (ours.codes_NK <= spec.qmax).all()
