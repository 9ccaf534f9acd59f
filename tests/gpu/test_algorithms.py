"""Rounding on the GPU against the same on the CPU."""

import pytest
import torch

from quantkit.algorithms.factor import factorize
from quantkit.algorithms.gptq import gptq
from quantkit.algorithms.scale_search import search_qparams
from quantkit.schemes import FloatSpec, IntSpec, PerBlock, PerChannel, PerGroup, PerTensor
from quantkit.schemes.tiles import dequantize_weight, quantize_weight
from tests.gpu.triton_device import generator

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
SPECS = {
    "int4 group": IntSpec(bits=4, granularity=PerGroup(64)),
    "int4 asymmetric": IntSpec(bits=4, granularity=PerGroup(32), symmetric=False),
    "int2 group": IntSpec(bits=2, granularity=PerGroup(32)),
    "int8 channel": IntSpec(bits=8, granularity=PerChannel()),
    "int8 tensor": IntSpec(bits=8, granularity=PerTensor()),
    "fp8 channel": FloatSpec(granularity=PerChannel()),
    "fp8 block": FloatSpec(granularity=PerBlock(128, 128)),
}
SHAPES = [(1, 64), (97, 576), (300, 1088)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("with_importance", [False, True])
def test_scales_are_those_of_the_cpu(spec, shape, with_importance):
    w_NK = torch.randn(shape, generator=generator(0))
    importance_K = torch.rand(shape[1], generator=generator(1)) if with_importance else None
    expected = search_qparams(w_NK, spec, torch.bfloat16, importance_K)
    on_gpu = None if importance_K is None else importance_K.cuda()
    got = search_qparams(w_NK.cuda(), spec, torch.bfloat16, on_gpu)
    assert got.scale.shape == expected.scale.shape
    same = got.scale.cpu() == expected.scale
    if expected.zero_point is not None:
        same &= got.zero_point.cpu() == expected.zero_point
    assert (
        same.float().mean() >= 0.98
    )  # sums in another order decide between candidates as good as each other


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_gptq_rounds_as_on_the_cpu(spec, shape):
    num_cols = shape[1]
    w_NK = torch.randn(shape, generator=generator(0))
    mix_KK = torch.randn(num_cols, num_cols, generator=generator(1)) / num_cols**0.5
    x_TK = torch.randn(2 * num_cols, num_cols, generator=generator(2)) @ mix_KK
    hessian_KK = x_TK.T @ x_TK / len(x_TK)
    hessian_KK[:, 3] = hessian_KK[3] = 0
    qparams = search_qparams(w_NK, spec, torch.bfloat16)
    expected = gptq(w_NK, factorize(hessian_KK), spec, qparams)
    on_gpu = qparams._replace(scale=qparams.scale.cuda())
    if qparams.zero_point is not None:
        on_gpu = on_gpu._replace(zero_point=qparams.zero_point.cuda())
    factor = factorize(hessian_KK.cuda())
    got = gptq(w_NK.cuda(), factor, spec, on_gpu)
    assert torch.equal(got.view(torch.uint8), gptq(w_NK.cuda(), factor, spec, on_gpu).view(torch.uint8))

    def loss(codes_NK):
        error_NK = (w_NK - dequantize_weight(codes_NK, spec.granularity, qparams)).double()
        return ((error_NK @ hessian_KK.double()) * error_NK).sum()

    ours = got.cpu()
    same_rows = (ours.float() == expected.float()).all(dim=1)
    assert (
        same_rows.float().mean() >= 0.9
    )  # a row differs from the first weight that rounding puts on the other side
    assert abs(loss(ours) / loss(expected) - 1) < 0.01
    assert loss(ours) <= loss(quantize_weight(w_NK, spec, qparams))
