"""Products of many rows, slice by slice, against float64."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: it comes with CUDA builds of torch")

from quantkit_kernels import sliced as s
from quantkit_kernels.strip_weight import prepare
from tests.gpu.test_skinny import random_weight, random_x
from tests.gpu.triton_device import generator, poisoned  # noqa: F401

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.usefixtures("poisoned"),
]
FORMATS = [("int4", 0), ("int4", 32), ("int4", 128), ("int8", 0), ("int8", 64), ("fp8", 0), ("fp8", 128)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(("kind", "group"), FORMATS)
@pytest.mark.parametrize(("n", "k"), [(576, 1536), (33, 200), (129, 4160), (40, 77)])
def test_rows_are_those_of_float64_rounded_once(n, k, kind, group, asymmetric, dtype):
    rows = 128 if kind == "fp8" and group else 1
    weight, w = random_weight(
        n, k, kind=kind, group=group, rows=rows, asymmetric=asymmetric and kind != "fp8"
    )
    out = torch.empty(n - 16, -(-k // 64) * 64, dtype=dtype, device="cuda")
    s.dequantize_rows(prepare(weight), 16, out)
    error = (out[:, :k].double() - w[16:]).abs()
    info = torch.finfo(dtype)
    assert (error <= info.eps / 2 * 1.001 * w[16:].abs() + info.smallest_normal * info.eps).all()


@pytest.mark.parametrize("with_bias", [False, True])
def test_slices_make_one_product(with_bias, monkeypatch):
    monkeypatch.setattr(s, "rows_of_slice", lambda *_: 256)
    weight, w = random_weight(700, 1536, group=128)
    x = random_x(300, 1536, torch.bfloat16)
    bias = torch.randn(700, generator=generator(3)).bfloat16().cuda() if with_bias else None
    y = s.sliced(x, prepare(weight), bias_N=bias)
    expected = x.double() @ w.T + (0 if bias is None else bias.double())
    magnitude = x.double().abs() @ w.abs().T
    bound = (
        2**-8 * expected.abs() + 2**-9 * (x.double().square() @ w.square().T).sqrt() * 8 + 1e-5 * magnitude
    )
    assert ((y.double() - expected).abs() <= bound).all()


def test_more_than_2_31_outputs():
    weight, w = random_weight(65536, 64, group=32)
    x = random_x(1 << 15, 64, torch.bfloat16).repeat(2, 1)[: 33 * 1024]
    y = s.sliced(x, prepare(weight))
    assert y.numel() > 2**31
    last = x[-100:].double()
    expected, magnitude = last @ w.T, last.abs() @ w.abs().T
    assert ((y[-100:].double() - expected).abs() <= 2**-8 * expected.abs() + 2**-8 * magnitude).all()
    assert torch.equal(y[: 1 << 10], y[1 << 15 :])
