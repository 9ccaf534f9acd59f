"""Relations that a scale search has to keep, whatever its grid."""

import pytest
import torch

from quantkit.algorithms.rtn import rtn
from quantkit.algorithms.scale_search import search_qparams
from quantkit.schemes import FloatSpec, IntSpec, PerBlock, PerChannel, PerGroup, PerTensor
from quantkit.schemes.tiles import dequantize_weight, minmax_qparams, quantize_weight

SPECS = {
    "int4 group": IntSpec(bits=4, granularity=PerGroup(32)),
    "int4 asymmetric": IntSpec(bits=4, granularity=PerGroup(32), symmetric=False),
    "int4 channel": IntSpec(bits=4, granularity=PerChannel()),
    "int2": IntSpec(bits=2, granularity=PerGroup(64)),
    "int8": IntSpec(bits=8, granularity=PerChannel()),
    "fp8": FloatSpec(granularity=PerChannel()),
    "fp8 tensor": FloatSpec(granularity=PerTensor()),
    "fp8 block": FloatSpec(granularity=PerBlock(128, 128)),
}


def weights(rows: int = 48, cols: int = 192, seed: int = 0) -> torch.Tensor:
    """Gaussian weights with a few large ones, as layers have them."""
    generator = torch.Generator().manual_seed(seed)
    w_NK = torch.randn(rows, cols, generator=generator)
    return w_NK * (1 + 6 * (torch.rand(rows, cols, generator=generator) < 0.02))


def loss(w_NK: torch.Tensor, spec, qparams, importance_K=None) -> torch.Tensor:
    """The objective of each row."""
    w_hat_NK = dequantize_weight(quantize_weight(w_NK, spec, qparams), spec.granularity, qparams)
    error = (w_hat_NK - w_NK).double().abs()
    return (error**2.5 if importance_K is None else error.square() * importance_K).sum(dim=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_it_is_never_worse_than_minmax_on_its_own_objective(spec, dtype):
    w_NK = weights()
    searched, minmax = search_qparams(w_NK, spec, dtype), minmax_qparams(w_NK, spec, dtype)
    assert searched.scale.dtype == dtype
    assert searched.scale.shape == minmax.scale.shape
    assert (searched.zero_point is None) == spec.symmetric
    ours, theirs = loss(w_NK, spec, searched), loss(w_NK, spec, minmax)
    assert ours.sum() < theirs.sum()
    if isinstance(spec.granularity, PerChannel | PerGroup):
        assert (ours <= theirs * 1.0001).all()


@pytest.mark.parametrize("spec", [SPECS["int4 group"], SPECS["int2"]], ids=["int4", "int2"])
def test_importance_moves_the_error_to_channels_that_do_not_matter(spec):
    w_NK = weights()
    importance_K = torch.ones(w_NK.shape[1])
    importance_K[::2] = 100.0
    plain = search_qparams(w_NK, spec, torch.float32)
    weighted = search_qparams(w_NK, spec, torch.float32, importance_K)
    assert loss(w_NK, spec, weighted, importance_K).sum() < loss(w_NK, spec, plain, importance_K).sum()
    assert loss(w_NK, spec, weighted).sum() > loss(w_NK, spec, plain).sum()


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_importance_alike_everywhere_is_the_squared_error(spec):
    """Its objective is the output's error, so scaling all importance changes nothing, and squares are what it beats."""
    w_NK = weights()
    ones_K = torch.ones(w_NK.shape[1])
    searched, minmax = (
        search_qparams(w_NK, spec, torch.bfloat16, ones_K),
        minmax_qparams(w_NK, spec, torch.bfloat16),
    )
    assert torch.equal(searched.scale, search_qparams(w_NK, spec, torch.bfloat16, 4 * ones_K).scale)
    assert loss(w_NK, spec, searched, ones_K).sum() < loss(w_NK, spec, minmax, ones_K).sum()


@pytest.mark.parametrize("name", ["int4 group", "int2"])
def test_a_fine_grid_of_ratios_finds_little_more(name):
    spec, w_NK = SPECS[name], weights()
    importance_K = torch.rand(w_NK.shape[1], generator=torch.Generator().manual_seed(1)) ** 4
    ours = loss(w_NK, spec, search_qparams(w_NK, spec, torch.float32, importance_K), importance_K)
    base = minmax_qparams(w_NK, spec, torch.float32).scale
    tiles = w_NK.view(*base.shape, -1)
    sign = torch.where(tiles.amax(-1) > -tiles.amin(-1), -1.0, 1.0)
    best = torch.full_like(base, torch.inf)
    for ratio in torch.linspace(0.5, 1.1, 61):
        scale = (base * sign * ratio).unsqueeze(-1)
        error = ((tiles / scale).round().clamp(spec.qmin, spec.qmax) * scale - tiles).square()
        best = torch.minimum(best, (error * importance_K.view(base.shape[1], -1)).sum(-1))
    assert ours.sum() <= 1.01 * best.sum()


def test_only_few_bit_symmetric_integers_have_scales_of_either_sign():
    w_NK = weights()
    for name, spec in SPECS.items():
        has_negative = bool((search_qparams(w_NK, spec, torch.bfloat16).scale < 0).any())
        assert has_negative == (isinstance(spec, IntSpec) and spec.symmetric and spec.bits <= 4), name


def test_the_largest_weight_of_a_group_lies_on_the_long_side():
    w_NK = torch.full((1, 32), 0.1)
    w_NK[0, 3] = 1.0
    spec = SPECS["int4 group"]
    result = rtn(w_NK, spec, torch.float32, scales="mse")
    assert result.qparams.scale.item() < 0
    assert result.codes_NK[0, 3] == result.codes_NK.min()


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("magnitude", [0.0, 1e-30, 1e30])
def test_rows_of_any_size_come_out_finite(spec, magnitude):
    w_NK = weights()
    w_NK[:4] *= magnitude
    result = rtn(w_NK, spec, torch.bfloat16)
    w_hat_NK = dequantize_weight(result.codes_NK, spec.granularity, result.qparams)
    assert torch.isfinite(w_hat_NK).all()
    assert (result.qparams.scale != 0).all()
    if magnitude == 0:
        assert (w_hat_NK[:4] == 0).all()


def test_it_does_not_depend_on_threads():
    w_NK, spec = weights(512, 512), SPECS["int4 group"]
    expected = search_qparams(w_NK, spec, torch.bfloat16)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = search_qparams(w_NK, spec, torch.bfloat16)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone.scale, expected.scale)
