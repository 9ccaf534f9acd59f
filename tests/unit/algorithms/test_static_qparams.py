"""Static input scales: better than the full range on what they minimize, and safe at the edges."""

import pytest
import torch

from quantkit.algorithms.static_qparams import static_qparams
from quantkit.numerics import affine
from quantkit.schemes import FloatSpec, IntSpec, PerTensor, QParams, Spec
from quantkit.schemes.tiles import minmax_qparams

INT8 = IntSpec(bits=8, granularity=PerTensor())
ASYMMETRIC = IntSpec(bits=8, granularity=PerTensor(), symmetric=False)
FP8 = FloatSpec(granularity=PerTensor())
every_spec = pytest.mark.parametrize("spec", [INT8, ASYMMETRIC, FP8], ids=["int8", "asymmetric", "fp8"])


def heavy_tailed(seed: int = 0) -> torch.Tensor:
    """Inputs whose largest values are far from the others, more of them positive."""
    x_TK = torch.randn(512, 32, generator=torch.Generator().manual_seed(seed))
    return x_TK.sign() * x_TK.abs() ** 3 + 0.5


def rounded(x_TK: torch.Tensor, spec: Spec, qparams: QParams) -> torch.Tensor:
    if isinstance(spec, FloatSpec):
        codes = affine.quantize_e4m3(x_TK, qparams.scale)
    else:
        codes = affine.quantize_int(x_TK, qparams.scale, qparams.zero_point, spec.qmin, spec.qmax)
    return affine.dequantize(codes, qparams.scale, qparams.zero_point)


def full_range(x_TK: torch.Tensor, spec: Spec) -> QParams:
    """The grid from the smallest to the largest input, no value clipped."""
    return minmax_qparams(x_TK.reshape(1, -1), spec, torch.float32)


@every_spec
def test_shapes_and_dtypes_are_those_on_disk(spec):
    x_TK = heavy_tailed()
    qparams = static_qparams(x_TK, x_TK.abs().max(), spec)
    assert (qparams.scale.shape, qparams.scale.dtype) == ((1,), torch.float32)
    assert qparams.scale > 0
    assert (qparams.zero_point is None) == spec.symmetric
    if qparams.zero_point is not None:
        assert (qparams.zero_point.shape, qparams.zero_point.dtype) == ((1,), torch.int8)


@every_spec
def test_a_scale_is_chosen_as_it_will_be_stored(spec):
    x_TK = heavy_tailed()
    coarse = static_qparams(x_TK, x_TK.abs().max(), spec, scale_dtype=torch.bfloat16)
    fine = static_qparams(x_TK, x_TK.abs().max(), spec)
    assert coarse.scale.dtype == torch.bfloat16
    later = QParams(fine.scale.bfloat16().float(), fine.zero_point)
    stored = QParams(coarse.scale.float(), coarse.zero_point)
    errors = [(rounded(x_TK, spec, q) - x_TK).square().mean() for q in (stored, later)]
    assert errors[0] <= errors[1]


@every_spec
def test_least_squares_is_no_worse_than_the_full_range(spec):
    x_TK = heavy_tailed()
    ours = static_qparams(x_TK, x_TK.abs().max(), spec)
    errors = [(rounded(x_TK, spec, q) - x_TK).square().mean() for q in (ours, full_range(x_TK, spec))]
    assert errors[0] <= errors[1]
    if isinstance(spec, IntSpec):
        assert errors[0] < 0.97 * errors[1]


@pytest.mark.parametrize("spec", [INT8, FP8], ids=["int8", "fp8"])
def test_absmax_counts_although_the_sample_missed_it(spec):
    sample = torch.linspace(-1, 1, 64).view(8, 8)
    seen = static_qparams(sample, torch.tensor(1.0), spec).scale
    missed = static_qparams(sample, torch.tensor(1.2), spec).scale
    assert missed.item() / seen.item() in (pytest.approx(1.2, rel=0.25), pytest.approx(1.0, rel=0.25))
    range_of_all = full_range(torch.cat([sample, torch.full((1, 8), 1.2)]), spec).scale
    assert missed <= range_of_all * 1.0001


def test_an_asymmetric_grid_shifts_to_where_the_inputs_are():
    x_TK = heavy_tailed().abs()
    symmetric, asymmetric = (static_qparams(x_TK, x_TK.max(), spec) for spec in (INT8, ASYMMETRIC))
    errors = [
        (rounded(x_TK, s, q) - x_TK).square().mean() for s, q in ((INT8, symmetric), (ASYMMETRIC, asymmetric))
    ]
    assert errors[1] < errors[0]


@every_spec
def test_inputs_that_were_always_zero(spec):
    x_TK = torch.zeros(4, 8)
    qparams = static_qparams(x_TK, torch.tensor(0.0), spec)
    assert (rounded(x_TK, spec, qparams) == 0).all()


@every_spec
def test_a_large_sample_is_thinned_the_same_way_every_time(spec):
    x_TK = heavy_tailed().repeat(64, 2)
    first, second = (static_qparams(x_TK, x_TK.abs().max(), spec) for _ in range(2))
    assert torch.equal(first.scale, second.scale)
