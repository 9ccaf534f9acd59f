"""Kernels that are called again with other numbers: of those, Triton compiles a 1 into the kernel."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: it comes with CUDA builds of torch")

from quantkit_kernels import (
    byte_tile_kernel,
    draw,
    filter_kernel,
    hadamard_kernel,
    sampling_kernel,
    strip_weight,
    w4a8,
    w4a8_kernel,
    w8a8_int8,
)
from quantkit_kernels.triton_launch import Launcher
from tests.gpu.test_w8a8 import BF16, check, random_weight, random_x
from tests.gpu.triton_device import generator, poisoned  # noqa: F401

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.usefixtures("poisoned"),
]


@pytest.fixture(autouse=True)
def none_launched_yet(monkeypatch):
    """As in a process of its own: the first call decides what later ones find."""
    for module, names in (
        (hadamard_kernel, ["_hadamard"]),
        (filter_kernel, ["_weigh", "_list", "_cut"]),
        (w4a8_kernel, ["_w4a8"]),
        (byte_tile_kernel, ["_byte_tile"]),
    ):
        for name in names:
            monkeypatch.setattr(module, name, Launcher(getattr(module, name).kernel))


def test_one_piece_is_rotated_then_many():
    x = torch.randn(49, 128, generator=generator(0)).to(BF16).cuda()
    each = torch.cat([hadamard_kernel.launch(row[None], 128) for row in x])
    for num_rows in (17, 33, 49):
        assert torch.equal(hadamard_kernel.launch(x[:num_rows], 128), each[:num_rows])


def test_one_part_for_a_program_then_several():
    num_rows = 256
    logits = torch.randn(num_rows, 262208, generator=generator(0)).to(BF16).cuda()
    setting = draw.pack_settings(temperature=1.0, top_k=0, top_p=0.9, min_p=0.0, seed=0)
    settings = torch.tensor([setting], dtype=torch.int32).cuda()

    def cuts(logits):
        rows = torch.zeros(len(logits), dtype=torch.int64, device="cuda")
        return filter_kernel.launch_filters(
            filter_kernel.Rows(logits, settings, rows, sampling_kernel.best_of_parts(logits))
        )

    alone = [cuts(logits[row : row + 1]) for row in (0, num_rows - 1)]
    together = cuts(logits)
    for one, row in zip(alone, (0, num_rows - 1), strict=True):
        assert all(torch.equal(of_one[0], of_all[row]) for of_one, of_all in zip(one, together, strict=True))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_one_group_then_seventeen(kind):
    for k in (128, 2176, 4224):
        weight, w = random_weight(256, k, "int4", tile=(1, 128), scale_dtype=BF16)
        codes, scale, _, x, _ = random_x(50, k, kind)
        y = w4a8.multiply(codes, scale, None, strip_weight.prepare(weight), None, BF16, batch_invariant=True)
        check(y, x, w, sum_bits=24 if kind == "int8" else 13)


def test_one_output_then_more():
    for n in (1, 17, 33):
        weight, w = random_weight(n, 512, "int8")
        codes, scale, _, x, _ = random_x(50, 512, "int8")
        y = w8a8_int8.multiply(
            codes, scale, None, w8a8_int8.prepare(weight), None, BF16, batch_invariant=True
        )
        check(y, x, w)
