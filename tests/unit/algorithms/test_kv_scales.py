"""Scales of the KV cache: candidates where errors can differ, and a choice that noise does not make."""

import pytest
import torch

from quantkit.algorithms.kv_scales import choose_scales, scale_candidates
from quantkit.numerics.kv_codes import LARGEST, round_trip_kv


@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("dtype", LARGEST)
def test_candidates_are_stored_exactly_and_reach_the_largest_value(dtype, per_head):
    absmax_H = torch.tensor([1.0, 37.0, 0.003])
    scales_CH = scale_candidates(absmax_H, dtype, torch.bfloat16, per_head=per_head)
    assert torch.equal(scales_CH, scales_CH.bfloat16().float()) and (scales_CH > 0).all()
    reach_CH = scales_CH * LARGEST[dtype]
    needed_H = absmax_H if per_head else absmax_H.amax().expand(3)
    assert torch.allclose(reach_CH[1 if dtype == "fp8" else 0], needed_H, rtol=2**-8)
    if dtype == "fp8":
        assert (scales_CH[0] == 1).all(), "the scale that every loader has comes first"
    assert per_head or (scales_CH == scales_CH[:, :1]).all()


def test_a_head_of_zeros_has_a_scale():
    for dtype in LARGEST:
        scales_CH = scale_candidates(torch.zeros(2), dtype, torch.bfloat16, per_head=True)
        assert (scales_CH > 0).all()
        assert (round_trip_kv(torch.zeros(2), dtype, scales_CH[-1]) == 0).all()


def test_fp8_candidates_are_one_octave_because_powers_of_two_change_nothing():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).clamp(min=0.1)
    for scale in scale_candidates(x.amax()[None], "fp8", torch.float32, per_head=True)[1:, 0]:
        assert torch.equal(round_trip_kv(x, "fp8", scale), round_trip_kv(x, "fp8", 2 * scale))
    first, *_, last = scale_candidates(x.amax()[None], "fp8", torch.float32, per_head=True)[1:, 0]
    assert first < last < 2 * first


def squared_errors(x_SHN, candidates_CH, dtype):
    trips = [x_SHN - round_trip_kv(x_SHN, dtype, scale_H[:, None]) for scale_H in candidates_CH]
    return torch.stack([error.square().sum(dim=2) for error in trips])


def test_int8_is_clipped_where_that_pays_and_only_there():
    generator = torch.Generator().manual_seed(0)
    peaked = torch.randn(16, 1, 4096, generator=generator)
    peaked[0, 0, 0] = 8.0
    flat = torch.rand(16, 1, 4096, generator=generator) * 2 - 1
    x_SHN = torch.cat([peaked, flat], dim=1)
    absmax_H = x_SHN.abs().amax(dim=(0, 2))
    candidates_CH = scale_candidates(absmax_H, "int8", torch.float32, per_head=True)
    chosen = choose_scales(candidates_CH, squared_errors(x_SHN, candidates_CH, "int8"), per_head=True)
    assert chosen.shape == (2, 1, 1)
    assert chosen[0] < candidates_CH[0, 0] and chosen[1] == candidates_CH[0, 1]


def test_a_scale_for_all_heads_is_chosen_by_all_of_them():
    candidates_CH = torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    errors_CH = torch.tensor([[5.0, 5.0], [1.0, 8.0], [4.0, 4.0]])
    errors_CSH = errors_CH[:, None].expand(3, 6, 2)
    assert choose_scales(candidates_CH, errors_CSH, per_head=False).tolist() == [3.0]
    assert choose_scales(candidates_CH, errors_CSH, per_head=True).flatten().tolist() == [2.0, 3.0]


def test_the_first_is_left_only_for_a_gain_beyond_its_standard_error():
    candidates_CH = torch.tensor([[1.0], [2.0]])
    noisy_S = torch.tensor([3.0, -2.5, 2.0, -2.0])
    for gain_S, expected in ((noisy_S, 1.0), (noisy_S.abs(), 2.0), (-noisy_S.abs(), 1.0), (0 * noisy_S, 1.0)):
        errors_CSH = torch.stack([torch.full((4,), 10.0), 10.0 - gain_S])[..., None]
        assert choose_scales(candidates_CH, errors_CSH, per_head=True).item() == expected
