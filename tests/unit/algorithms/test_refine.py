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


class Problem:
    """A weight and the second moments of its input."""

    def __init__(self, w_NK, hessian_KK) -> None:
        self.w_NK, self.hessian_KK, self.factor = w_NK, hessian_KK, factor_of(hessian_KK)

    def start(self, spec, scale_dtype=torch.bfloat16):
        """GPTQ's codes and scales."""
        importance_K = self.hessian_KK.diagonal()
        _, qparams = rtn(self.w_NK, spec, scale_dtype, scales="importance", importance_K=importance_K)
        return Rounded(gptq(self.w_NK, self.factor, spec, qparams), qparams)

    def refine(self, start, spec, **options):
        return refine(self.w_NK, start.codes_NK, start.qparams, self.hessian_KK, self.factor, spec, **options)

    def loss(self, spec, rounded) -> float:
        """What the sweeps lower: the output error with the damping, float64."""
        error = (
            self.w_NK.double()
            - dequantize_weight(rounded.codes_NK, spec.granularity, rounded.qparams).double()
        )
        damping = self.factor.damping * self.hessian_KK.diagonal().double().mean()
        damped = self.hessian_KK.double() + damping * torch.eye(len(self.hessian_KK))
        return torch.einsum("nk,kj,nj->", error, damped, error).item()


def problem(rows: int = 40, cols: int = 192) -> Problem:
    return Problem(weights(rows, cols), hessian(cols))


@every_spec
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
def test_no_sweep_is_worse_than_the_one_before(spec, scale_dtype):
    given = problem()
    start = given.start(spec, scale_dtype)
    losses = [given.loss(spec, given.refine(start, spec, sweeps=sweeps)) for sweeps in range(4)]
    for before, after in itertools.pairwise(losses):
        assert after <= before * (1 + 1e-6)
    assert losses[1] < losses[0]


@every_spec
def test_it_improves_rtn_too(spec):
    given = problem()
    start = rtn(given.w_NK, spec, torch.bfloat16)
    refined = given.refine(start, spec)
    assert given.loss(spec, refined) < 0.9 * given.loss(spec, start)
    assert refined.codes_NK.dtype == start.codes_NK.dtype


@every_spec
def test_scales_keep_dtype_shape_and_sign(spec):
    given = problem()
    start = given.start(spec)
    before, after = start.qparams.scale, given.refine(start, spec).qparams.scale
    assert (after.dtype, after.shape) == (before.dtype, before.shape)
    assert torch.equal(after.sign(), before.sign())
    owns = isinstance(spec.granularity, PerChannel | PerGroup)
    assert torch.equal(after, before) != owns


def test_a_weight_that_lies_on_its_grid_stays():
    spec = SPECS["int4 group"]
    generator = torch.Generator().manual_seed(0)
    codes_NK = torch.randint(-8, 8, (12, 64), generator=generator, dtype=torch.int8)
    qparams = QParams(torch.rand(12, 2, generator=generator).add(0.1).bfloat16())
    given = Problem(dequantize_weight(codes_NK, spec.granularity, qparams), hessian(64))
    refined = given.refine(Rounded(codes_NK, qparams), spec)
    assert torch.equal(refined.codes_NK, codes_NK)
    assert torch.equal(refined.qparams.scale, qparams.scale)


def test_a_group_of_zeros_keeps_its_scale():
    spec, w_NK, hessian_KK = SPECS["int4 group"], weights(6, 64), hessian(64)
    w_NK[:, :32] = 0
    hessian_KK[:32, 32:] = hessian_KK[32:, :32] = 0
    start = rtn(w_NK, spec, torch.bfloat16)
    refined = Problem(w_NK, hessian_KK).refine(start, spec)
    assert (refined.codes_NK[:, :32] == 0).all()
    assert torch.equal(refined.qparams.scale[:, 0], start.qparams.scale[:, 0])


def test_rows_do_not_know_of_each_other():
    spec, given = SPECS["int4 asymmetric"], problem()
    start = given.start(spec)
    whole = given.refine(start, spec)
    some = QParams(*(None if part is None else part[:7] for part in start.qparams))
    part = Problem(given.w_NK[:7], given.hessian_KK).refine(Rounded(start.codes_NK[:7], some), spec)
    assert (whole.codes_NK[:7] == part.codes_NK).float().mean() > 0.98


def test_the_output_error_shrinks_as_well():
    spec, given = SPECS["int4 group"], problem()
    start = given.start(spec)
    errors = [
        output_loss(
            given.w_NK - dequantize_weight(one.codes_NK, spec.granularity, one.qparams), given.hessian_KK
        )
        for one in (start, given.refine(start, spec))
    ]
    assert errors[1] < errors[0]


def test_columns_that_never_fired_stay_finite():
    spec, hessian_KK = SPECS["int4 group"], hessian(64)
    hessian_KK[5] = hessian_KK[:, 5] = 0
    given = Problem(weights(6, 64), hessian_KK)
    assert torch.isfinite(given.refine(given.start(spec), spec).qparams.scale).all()
