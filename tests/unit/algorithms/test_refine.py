"""Sweeps over scales and codes: the loss never grows, and an exact start stays."""

import itertools

import pytest
import torch

from quantkit.algorithms.factor import Factor, factorize
from quantkit.algorithms.gptq import gptq
from quantkit.algorithms.refine import refine
from quantkit.algorithms.rounded import Rounded, output_loss
from quantkit.algorithms.rtn import rtn
from quantkit.schemes import FloatSpec, IntSpec, PerBlock, PerChannel, PerGroup, PerTensor, QParams
from quantkit.schemes.tiles import dequantize_weight
from tests.unit.algorithms.correlated import hessian, weights

SPECS = {
    "int4 group": IntSpec(bits=4, granularity=PerGroup(32)),
    "int4 asymmetric": IntSpec(bits=4, granularity=PerGroup(32), symmetric=False),
    "int4 channel": IntSpec(bits=4, granularity=PerChannel()),
    "int2": IntSpec(bits=2, granularity=PerGroup(64)),
    "int8 tensor": IntSpec(bits=8, granularity=PerTensor()),
    "fp8 channel": FloatSpec(granularity=PerChannel()),
    "fp8 block": FloatSpec(granularity=PerBlock(128, 128)),
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def factor_of(hessian_KK: torch.Tensor) -> Factor:
    factor = factorize(hessian_KK)
    assert factor is not None
    return factor


def damped_loss(w_NK, spec, rounded: Rounded, factor: Factor) -> float:
    """What the sweeps lower: the loss with the damping, float64."""
    error = w_NK.double() - dequantize_weight(rounded.codes_NK, spec.granularity, rounded.qparams).double()
    damped = factor.hessian_KK.double() + factor.damping * torch.eye(len(factor.hessian_KK))
    return torch.einsum("nk,kj,nj->", error, damped, error).item()


@every_spec
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
def test_no_sweep_is_worse_than_the_one_before(spec, scale_dtype):
    w_NK, factor = weights(40, 192), factor_of(hessian(192))
    start = gptq(w_NK, factor, spec, scale_dtype)
    losses = [
        damped_loss(w_NK, spec, refine(w_NK, start, factor, spec, sweeps=sweeps), factor)
        for sweeps in range(4)
    ]
    for before, after in itertools.pairwise(losses):
        assert after <= before * (1 + 1e-6)
    assert losses[1] < losses[0]


@every_spec
def test_it_improves_rtn_too(spec):
    w_NK, factor = weights(40, 192), factor_of(hessian(192))
    nearest = rtn(w_NK, spec, torch.bfloat16)
    start = Rounded(nearest.codes_NK, nearest.qparams, 0.0)
    refined = refine(w_NK, start, factor, spec)
    assert damped_loss(w_NK, spec, refined, factor) < 0.9 * damped_loss(w_NK, spec, start, factor)
    assert refined.codes_NK.dtype == nearest.codes_NK.dtype


@every_spec
def test_the_loss_is_that_of_the_result(spec):
    w_NK, hessian_KK = weights(40, 192), hessian(192)
    factor = factor_of(hessian_KK)
    refined = refine(w_NK, gptq(w_NK, factor, spec, torch.bfloat16), factor, spec)
    error = w_NK - dequantize_weight(refined.codes_NK, spec.granularity, refined.qparams)
    assert refined.loss == pytest.approx(output_loss(error, hessian_KK), rel=1e-3)


@every_spec
def test_scales_keep_dtype_shape_and_sign(spec):
    w_NK, factor = weights(40, 192), factor_of(hessian(192))
    start = gptq(w_NK, factor, spec, torch.bfloat16)
    before, after = start.qparams.scale, refine(w_NK, start, factor, spec).qparams.scale
    assert (after.dtype, after.shape) == (before.dtype, before.shape)
    assert torch.equal(after.sign(), before.sign())
    owns = isinstance(spec.granularity, PerChannel | PerGroup)
    assert torch.equal(after, before) != owns


def test_a_weight_that_lies_on_its_grid_stays():
    spec, factor = SPECS["int4 group"], factor_of(hessian(64))
    generator = torch.Generator().manual_seed(0)
    codes_NK = torch.randint(-8, 8, (12, 64), generator=generator, dtype=torch.int8)
    qparams = QParams(torch.rand(12, 2, generator=generator).add(0.1).bfloat16())
    w_NK = dequantize_weight(codes_NK, spec.granularity, qparams)
    refined = refine(w_NK, Rounded(codes_NK, qparams, 0.0), factor, spec)
    assert torch.equal(refined.codes_NK, codes_NK)
    assert torch.equal(refined.qparams.scale, qparams.scale)


def test_a_group_of_zeros_keeps_its_scale():
    spec, factor = SPECS["int4 group"], factor_of(hessian(64))
    w_NK = weights(6, 64)
    w_NK[:, :32] = 0
    start = rtn(w_NK, spec, torch.bfloat16)
    block_hessian = factor.hessian_KK.clone()
    block_hessian[:32, 32:] = block_hessian[32:, :32] = 0
    refined = refine(w_NK, Rounded(*start, 0.0), factor_of(block_hessian), spec)
    assert (refined.codes_NK[:, :32] == 0).all()
    assert torch.equal(refined.qparams.scale[:, 0], start.qparams.scale[:, 0])


def test_rows_do_not_know_of_each_other():
    spec, w_NK, factor = SPECS["int4 asymmetric"], weights(40, 192), factor_of(hessian(192))
    start = gptq(w_NK, factor, spec, torch.bfloat16)
    whole = refine(w_NK, start, factor, spec)
    some = QParams(*(None if part is None else part[:7] for part in start.qparams))
    part = refine(w_NK[:7], Rounded(start.codes_NK[:7], some, 0.0), factor, spec)
    assert (whole.codes_NK[:7] == part.codes_NK).float().mean() > 0.98


def test_columns_that_never_fired_stay_finite():
    spec, hessian_KK = SPECS["int4 group"], hessian(64)
    hessian_KK[5] = hessian_KK[:, 5] = 0
    factor = factor_of(hessian_KK)
    w_NK = weights(6, 64)
    refined = refine(w_NK, gptq(w_NK, factor, spec, torch.bfloat16), factor, spec)
    assert torch.isfinite(refined.qparams.scale).all()
