"""Tiles: which elements share a scale, in the shape the scale has on disk."""

import pytest
import torch

from quantkit.numerics.affine import E4M3_MAX
from quantkit.schemes import IntSpec, PerBlock, PerChannel, PerGroup, PerTensor, PerToken, QParams
from quantkit.schemes.tiles import (
    dequantize_weight,
    from_tiles,
    minmax_qparams,
    quantize_weight,
    round_scale,
    scale_shape,
    to_tiles,
)
from tests.product_schemes import SCHEMES

WEIGHT_SPECS = {name: scheme.weight for name, scheme in SCHEMES.items()}
GRANULARITIES = [PerTensor(), PerChannel(), PerGroup(32), PerGroup(64), PerBlock(128, 128), PerBlock(3, 5)]


def weight(num_rows=130, num_cols=192, seed=0):
    w_NK = torch.randn(num_rows, num_cols, generator=torch.Generator().manual_seed(seed))
    w_NK[0] = 0  # one scale's worth of nothing
    return w_NK


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_tiles_and_back(granularity):
    w_NK = weight()
    assert torch.equal(from_tiles(to_tiles(w_NK, granularity), granularity, *w_NK.shape), w_NK)
    transposed = w_NK.T.contiguous().T
    assert torch.equal(to_tiles(transposed, granularity), to_tiles(w_NK, granularity))


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_one_tile_per_scale(granularity):
    tiles, shape = to_tiles(weight(), granularity), scale_shape(granularity, 130, 192)
    assert tiles.shape[:-1] == shape


def test_each_element_meets_its_own_scale():
    w_NK = torch.ones(6, 8, dtype=torch.int8)
    block = QParams(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    dense = dequantize_weight(w_NK, PerBlock(4, 4), block)
    assert dense[0, 0] == 1 and dense[3, 4] == 2 and dense[4, 3] == 3 and dense[5, 7] == 4
    group = QParams(torch.arange(12.0).view(6, 2), torch.ones(6, 2, dtype=torch.int8))
    assert dequantize_weight(w_NK * 2, PerGroup(4), group)[5].tolist() == [10] * 4 + [11] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name", ["int4-g32-sym", "int4-g64-asym", "int8-channel-sym", "fp8-block", "fp8-tensor-static"]
)
def test_codes_survive_a_second_quantization(name, dtype):
    spec = WEIGHT_SPECS[name]
    qparams = minmax_qparams(weight(), spec, dtype)
    assert qparams.scale.dtype == dtype and (qparams.scale > 0).all()
    assert qparams.scale.shape == scale_shape(spec.granularity, 130, 192)
    codes_NK = quantize_weight(weight(), spec, qparams)
    again = quantize_weight(dequantize_weight(codes_NK, spec.granularity, qparams), spec, qparams)
    assert torch.equal(again.view(torch.int8), codes_NK.view(torch.int8))


@pytest.mark.parametrize("name", WEIGHT_SPECS)
def test_error_stays_within_half_a_step(name):
    spec, w_NK = WEIGHT_SPECS[name], weight(130, 256)
    qparams = minmax_qparams(w_NK, spec, torch.float32)
    codes_NK = quantize_weight(w_NK, spec, qparams)
    assert codes_NK.is_contiguous() and codes_NK.shape == w_NK.shape
    error = (dequantize_weight(codes_NK, spec.granularity, qparams) - w_NK).abs()
    steps = dequantize_weight(torch.ones_like(w_NK), spec.granularity, QParams(qparams.scale))
    if isinstance(spec, IntSpec):
        assert codes_NK.dtype == torch.int8
        assert (error <= steps * (0.5001 if spec.symmetric else 1.0001)).all()
    else:
        assert codes_NK.dtype == torch.float8_e4m3fn
        assert codes_NK.float().abs().max() == E4M3_MAX
        assert (error <= torch.maximum(w_NK.abs() / 16, steps / 512 / 2) * 1.0001).all()  # 3 mantissa bits


def test_a_scale_never_underflows_to_zero():
    tiny = torch.tensor([1e-30, 1.0])
    assert (round_scale(tiny, torch.float16) > 0).all()
    assert round_scale(tiny, torch.bfloat16)[1] == 1


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_weight_that_is_not_finite_does_not_hide_in_a_finite_scale(value, symmetric):
    w_NK = weight(2, 32)
    w_NK[1, 3] = value
    spec = IntSpec(bits=4, granularity=PerChannel(), symmetric=symmetric)
    scale = minmax_qparams(w_NK, spec, torch.bfloat16).scale
    assert torch.isfinite(scale).tolist() == [[True], [False]]


def test_token_granularity_is_not_for_weights():
    with pytest.raises(AssertionError, match="not for weights"):
        scale_shape(PerToken(), 2, 2)
