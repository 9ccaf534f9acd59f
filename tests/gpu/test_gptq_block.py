"""The GPTQ block kernel against its definition in float64, decision by decision.

Comparing whole runs would not do: where float32 falls on the other side of a rounding boundary, all later columns
differ. So the kernel's own codes are followed in float64, and each has to be the nearest one, give or take the
rounding errors of its target.
"""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed: it comes with CUDA builds of torch")

from quantkit_kernels.gptq_block import gptq_block
from quantkit_kernels.gptq_block_kernel import launch
from tests.gpu.triton_device import DEVICE, IS_INTERPRETED, generator, needs_gpu, needs_kernels, poisoned  # noqa: F401

pytestmark = [*needs_kernels, pytest.mark.usefixtures("poisoned")]
EPS = torch.finfo(torch.float32).eps
E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
E4M3 = E4M3[E4M3.isfinite()].unique()


class Block(NamedTuple):
    """Arguments of the kernel."""

    w_BCN: Tensor
    carried_BCN: Tensor
    lower_BCC: Tensor
    scale_BGN: Tensor
    zero_point_BGN: Tensor | None
    group_C: Tensor
    qmin: int
    qmax: int
    is_float8: bool

    @property
    def grid(self) -> Tensor:
        return E4M3 if self.is_float8 else torch.arange(self.qmin, self.qmax + 1, dtype=torch.float64)


def make_block(
    num_rows, num_columns, *, batch=1, bits=4, groups=3, asymmetric=False, dtype=torch.float32, seed=0
) -> Block:
    random = generator(seed)
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    w = torch.randn(batch, num_columns, num_rows, generator=random)
    x = torch.randn(batch, num_columns, 3 * num_columns, generator=random)
    x += torch.randn(batch, 1, 3 * num_columns, generator=random)  # correlated, as inputs are
    hessian = x @ x.mT / (3 * num_columns)
    lower = torch.linalg.cholesky(hessian.double()).float()
    half = 448 if bits == 0 else (qmax - qmin) / 2
    scale = (2 + torch.rand(batch, groups, num_rows, generator=random)) / half
    scale *= torch.where(torch.rand(scale.shape, generator=random) < 0.5, -1, 1)
    zero_point = None
    if asymmetric:
        zero_point = torch.randint(qmin, qmax + 1, scale.shape, generator=random).to(torch.int8).to(DEVICE)
    return Block(
        w.to(DEVICE, dtype),
        torch.randn(w.shape, generator=random).mul(0.3).to(DEVICE),
        lower.to(DEVICE),
        scale.to(DEVICE, dtype),
        zero_point,
        torch.randint(0, groups, (num_columns,), generator=random).to(DEVICE),
        qmin,
        qmax,
        bits == 0,
    )


def check(block: Block, codes: Tensor, lost: Tensor, loss: Tensor) -> None:
    """Every code is the nearest to its target, as float64 computes it from the codes there are; the rest fits."""
    num_columns = block.w_BCN.shape[1]
    w, lower = block.w_BCN.double().cpu(), block.lower_BCC.double().cpu().tril()
    group = block.group_C.cpu()
    scale = block.scale_BGN.double().cpu()[:, group]
    zero = torch.zeros(()) if block.zero_point_BGN is None else block.zero_point_BGN.double().cpu()[:, group]
    values = (codes.view(torch.float8_e4m3fn) if block.is_float8 else codes).double().cpu()
    exact_lost = w - (values - zero) * scale
    size = w.abs() + ((values - zero) * scale).abs()
    assert ((lost.double().cpu() - exact_lost).abs() <= 2 * EPS * size).all()

    diagonal = lower.diagonal(dim1=1, dim2=2).unsqueeze(-1)
    strict = lower.tril(-1)
    carried = block.carried_BCN.double().cpu()
    target = w + (carried + strict.mT @ exact_lost) / diagonal
    # num_columns products and additions, then a division, an addition, and those of position
    size = w.abs() + (carried.abs() + strict.abs().mT @ (exact_lost.abs() + EPS * size)) / diagonal
    slack = (num_columns + 8) * EPS * size
    position, tolerance = (
        target / scale + zero,
        slack / scale.abs() + 4 * EPS * (target / scale).abs() + EPS * 16,
    )
    nearest = (position.unsqueeze(-1) - block.grid).abs().amin(dim=-1)
    excess = ((position - values).abs() - nearest) / tolerance
    assert excess.max() <= 2, f"a code is off by {excess.max():.1f} times the rounding error"

    error = (target - (values - zero) * scale).abs()
    exact_loss = ((error * diagonal) ** 2).sum(dim=1)
    bound = ((2 * error * slack + slack**2) * diagonal**2).sum(dim=1) + (num_columns + 8) * EPS * exact_loss
    assert ((loss.double().cpu() - exact_loss).abs() <= bound).all()


SHAPES = (
    [(1, 1), (31, 7), (33, 40)] if IS_INTERPRETED else [(1, 1), (1, 128), (4097, 128), (64, 40), (70, 17)]
)


@pytest.mark.parametrize(("num_rows", "num_columns"), SHAPES)
@pytest.mark.parametrize(
    ("bits", "asymmetric"), [(4, False), (4, True), (2, False), (8, False), (8, True), (0, False)]
)
def test_each_code_is_the_nearest_to_its_target(num_rows, num_columns, bits, asymmetric):
    block = make_block(num_rows, num_columns, bits=bits, asymmetric=asymmetric)
    check(block, *launch(*block))


def test_batches_have_their_own_factor():
    block = make_block(35, 33, batch=3)
    results = launch(*block)
    check(block, *results)
    alone = block._replace(
        **{name: getattr(block, name)[2:] for name in ("w_BCN", "carried_BCN", "lower_BCC", "scale_BGN")}
    )
    for together, single in zip(results, launch(*alone), strict=True):
        assert torch.equal(together[2:], single)


def test_it_reads_views_of_larger_matrices_and_only_the_lower_triangle():
    block = make_block(35, 33)
    whole = torch.full((1, 99, 70), torch.nan, device=DEVICE)
    whole[:, 20:53, 1:36] = block.w_BCN
    factor = torch.full((1, 99, 99), torch.nan, device=DEVICE)
    factor[:, 20:53, 20:53] = torch.where(block.lower_BCC.tril() == 0, torch.nan, block.lower_BCC)
    view = block._replace(w_BCN=whole[:, 20:53, 1:36], lower_BCC=factor[:, 20:53, 20:53])
    for expected, got in zip(launch(*block), launch(*view), strict=True):
        assert torch.equal(expected, got)


def test_without_correlations_it_is_rounding_to_nearest():
    block = make_block(50, 64)
    identity = torch.eye(64, device=DEVICE).unsqueeze(0)
    block = block._replace(lower_BCC=identity, carried_BCN=torch.zeros_like(block.carried_BCN))
    codes, lost, _ = launch(*block)
    scale = block.scale_BGN[:, block.group_C]
    expected = (block.w_BCN / scale).round().clamp(block.qmin, block.qmax)
    assert torch.equal(codes, expected.to(torch.int8))
    dequantized = expected.double() * scale.double()
    exact = block.w_BCN.double() - dequantized
    # one rounding where product and difference are fused, two where not
    assert bool(((lost - exact).abs() <= 2**-24 * (dequantized.abs() + exact.abs())).all())


def test_it_is_the_same_every_time_and_for_any_tiling():
    block = make_block(70, 40)
    first = launch(*block)
    for rows in (64,) if IS_INTERPRETED else (16, 64, 128):
        check(block, *launch(*block, rows=rows))
    for _ in range(1 if IS_INTERPRETED else 20):
        assert all(map(torch.equal, first, launch(*block)))


@needs_gpu
@pytest.mark.parametrize("bits", [4, 0])
def test_bfloat16_weights_and_scales(bits):
    block = make_block(4097, 128, bits=bits, dtype=torch.bfloat16)
    check(block, *launch(*block))


@needs_gpu
def test_the_operator_and_its_fake_agree():
    block = make_block(33, 40)
    torch.library.opcheck(gptq_block, tuple(block), test_utils=("test_schema", "test_faketensor"))
