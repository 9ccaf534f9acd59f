"""GPTQ against its definition by the inverse of H, in float64, and what has to hold for any rounding of its kind."""

import pytest
import torch

from quantkit.algorithms.factor import factorize
from quantkit.algorithms.gptq import gptq
from quantkit.schemes import FloatSpec, IntSpec, PerBlock, PerChannel, PerGroup, PerTensor
from quantkit.schemes.tiles import dequantize_weight, expand_to_weight, minmax_qparams, quantize_weight

SPECS = {
    "int4 group": IntSpec(bits=4, granularity=PerGroup(32)),
    "int4 asymmetric": IntSpec(bits=4, granularity=PerGroup(32), symmetric=False),
    "int8 channel": IntSpec(bits=8, granularity=PerChannel()),
    "int8 tensor": IntSpec(bits=8, granularity=PerTensor()),
    "fp8 channel": FloatSpec(granularity=PerChannel()),
    "fp8 block": FloatSpec(granularity=PerBlock(32, 64)),
}
NUM_ROWS, NUM_COLS = 40, 288  # three blocks of columns, the last of 32


@pytest.fixture
def problem():
    """Weights, and second moments of correlated inputs with a few large channels."""
    random = torch.Generator().manual_seed(0)
    w_NK = torch.randn(NUM_ROWS, NUM_COLS, generator=random)
    x_TK = torch.randn(600, NUM_COLS, generator=random) @ torch.randn(NUM_COLS, NUM_COLS, generator=random)
    x_TK[:, ::50] *= 10
    return w_NK, x_TK.T @ x_TK / len(x_TK)


def by_the_inverse(w_NK, hessian_KK, spec, qparams, damping):
    """Codes by the paper's recursion on the Cholesky factor of the inverse, float64, as float64."""
    order_K = hessian_KK.diagonal().argsort(descending=True, stable=True)
    damped_KK = hessian_KK.double() + damping * hessian_KK.diagonal().double().mean() * torch.eye(
        len(order_K)
    )
    inverse_KK = torch.linalg.inv(damped_KK[order_K][:, order_K])
    upper_KK = torch.linalg.cholesky(inverse_KK, upper=True)
    shape = w_NK.shape
    scale_NK = expand_to_weight(qparams.scale.double(), spec.granularity, *shape)[:, order_K]
    zero_NK = torch.zeros_like(scale_NK)
    if qparams.zero_point is not None:
        zero_NK = expand_to_weight(qparams.zero_point.double(), spec.granularity, *shape)[:, order_K]
    w_NK = w_NK.double()[:, order_K].clone()
    codes_NK = torch.empty_like(w_NK)
    for column in range(shape[1]):
        position_N = w_NK[:, column] / scale_NK[:, column] + zero_NK[:, column]
        if isinstance(spec, FloatSpec):
            codes_NK[:, column] = position_N.clamp(-448, 448).float().to(torch.float8_e4m3fn).double()
        else:
            codes_NK[:, column] = position_N.round().clamp(spec.qmin, spec.qmax)
        rounded_N = (codes_NK[:, column] - zero_NK[:, column]) * scale_NK[:, column]
        error_N = (w_NK[:, column] - rounded_N) / upper_KK[column, column]
        w_NK[:, column + 1 :] -= error_N.unsqueeze(1) * upper_KK[column, column + 1 :]
    return codes_NK[:, order_K.argsort()]


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_it_takes_the_codes_of_the_papers_recursion(spec, problem):
    w_NK, hessian_KK = problem
    qparams = minmax_qparams(w_NK, spec, torch.bfloat16)
    factor = factorize(hessian_KK)
    codes_NK = gptq(w_NK, factor, spec, qparams)
    expected_NK = by_the_inverse(w_NK, hessian_KK, spec, qparams, factor.damping)
    # float32 may round one weight in 10^4 to the other side, which moves the rest of its row
    num_equal = (codes_NK.double() == expected_NK).all(dim=1).sum()
    assert num_equal >= NUM_ROWS - 2


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_uncorrelated_inputs_make_it_rounding_to_nearest(spec):
    w_NK = torch.randn(NUM_ROWS, NUM_COLS, generator=torch.Generator().manual_seed(1))
    qparams = minmax_qparams(w_NK, spec, torch.bfloat16)
    factor = factorize(torch.eye(NUM_COLS))
    assert torch.equal(
        gptq(w_NK, factor, spec, qparams).float(), quantize_weight(w_NK, spec, qparams).float()
    )


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_it_beats_nearest_on_its_own_objective(spec, problem):
    w_NK, hessian_KK = problem
    qparams = minmax_qparams(w_NK, spec, torch.bfloat16)

    def loss(codes_NK):
        error_NK = (w_NK - dequantize_weight(codes_NK, spec.granularity, qparams)).double()
        return ((error_NK @ hessian_KK.double()) * error_NK).sum()

    ours = loss(gptq(w_NK, factorize(hessian_KK), spec, qparams))
    assert ours < 0.9 * loss(quantize_weight(w_NK, spec, qparams))


def test_rows_do_not_depend_on_each_other(problem):
    w_NK, hessian_KK = problem
    spec = SPECS["int4 group"]
    qparams = minmax_qparams(w_NK, spec, torch.bfloat16)
    factor = factorize(hessian_KK)
    some = gptq(w_NK[7:20], factor, spec, qparams._replace(scale=qparams.scale[7:20]))
    assert torch.equal(gptq(w_NK, factor, spec, qparams)[7:20], some)


def test_inputs_that_never_fire_get_code_zero_and_change_nothing(problem):
    w_NK, hessian_KK = problem
    hessian_KK[:, 5] = hessian_KK[5] = 0
    spec = SPECS["int4 group"]
    qparams = minmax_qparams(w_NK, spec, torch.bfloat16)
    factor = factorize(hessian_KK)
    assert factor.dead_K.nonzero().flatten().tolist() == [5]
    codes_NK = gptq(w_NK, factor, spec, qparams)
    assert (codes_NK[:, 5] == 0).all()
    other_NK = w_NK.clone()
    other_NK[:, 5] = 3.0
    assert torch.equal(gptq(other_NK, factor, spec, qparams), codes_NK)


def test_the_factor_is_that_of_the_damped_moments_in_ascending_order(problem):
    _, hessian_KK = problem
    factor = factorize(hessian_KK)
    diagonal_K = hessian_KK.diagonal()
    assert (diagonal_K[factor.order_K].diff() >= 0).all()
    lower_KK = factor.lower_KK.double()
    assert torch.equal(lower_KK, lower_KK.tril())
    damped_KK = hessian_KK.double() + 0.01 * diagonal_K.double().mean() * torch.eye(NUM_COLS)
    expected_KK = damped_KK[factor.order_K][:, factor.order_K]
    torch.testing.assert_close(
        lower_KK @ lower_KK.T, expected_KK, rtol=0, atol=1e-5 * expected_KK.max().item()
    )


def test_what_is_not_positive_definite_takes_more_damping_and_the_hopeless_none():
    low_rank_KK = torch.ones(64, 64)
    assert factorize(low_rank_KK) is not None
    indefinite_KK = torch.ones(64, 64) + torch.diag(torch.full((64,), -0.5))
    factor = factorize(indefinite_KK)
    assert factor is not None
    assert factor.damping > 0.01
    assert factorize(torch.ones(64, 64) - 1) is None
    assert factorize(torch.full((64, 64), torch.nan)) is None
