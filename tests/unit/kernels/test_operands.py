"""Tensors that kernels would read wrongly are named before they are: of other dtypes, shapes, strides and devices."""

import pytest
import torch

from quantkit_kernels import moe, moe_routing, strip_weight, w4a8, w8a8_fp8, w8a8_int8, weight_only
from quantkit_kernels.operators import for_device
from quantkit_kernels.weight import LinearWeight

CPU = torch.device("cpu")
N, K, M = 33, 200, 5
BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn


def weight(bits, group=32, codes=torch.int8, asymmetric=False, tile=None):
    tile = tile or (1, group or K)
    grid = (-(-N // tile[0]), -(-K // tile[1]))
    zero = torch.zeros(grid, dtype=torch.int8) if asymmetric else None
    return LinearWeight(torch.zeros(N, K, dtype=codes), torch.ones(grid), zero, tile, bits)


def of_weight_only(**format_):
    stored, scale, zero, _, (n, _), bits, group = strip_weight.prepare(weight(**format_))
    names = ("x", "stored", "scale", "zero", "bias", "n", "bits", "group", "invariant")
    values = (
        torch.ones(M, K, dtype=BF16),
        stored,
        scale,
        zero,
        torch.ones(N, dtype=BF16),
        n,
        bits,
        group,
        False,
    )
    return weight_only.weight_only, dict(zip(names, values, strict=True))


def of_codes(codes=torch.int8, with_zero=False):
    zero = torch.zeros(M, 1, dtype=torch.int8) if with_zero else None
    return {"x": torch.zeros(M, K).to(codes), "x_scale": torch.ones(M, 1), "x_zero": zero}


def of_w4a8(group=32, with_zero=True, asymmetric=False):
    found = strip_weight.prepare(weight(4, group, asymmetric=asymmetric), with_row_sum=with_zero)
    own = {"stored": found.stored, "scale": found.scale, "zero": found.zero_point, "row_sum": found.row_sum}
    more = {"bias": torch.ones(N), "n": N, "group": found.group_size, "out": BF16, "invariant": False}
    return w4a8.w4a8, of_codes(with_zero=with_zero) | own | more


def of_int8():
    found = w8a8_int8.prepare(weight(8, 0))
    more = {"bias": torch.ones(N), "out": BF16, "invariant": False}
    names = ("stored", "scale", "code_sum", "row_sum")
    return w8a8_int8.w8a8_int8, of_codes(with_zero=True) | dict(zip(names, found, strict=True)) | more


def of_fp8(tile=(1, K)):
    stored, scale, _ = w8a8_fp8.prepare(weight(8, codes=E4M3, tile=tile))
    own = of_codes(E4M3)
    del own["x_zero"]
    if tile == (128, 128):
        own["x_scale"] = torch.ones(M, 2)
    more = {"bias": torch.ones(N), "n": N, "out": BF16, "invariant": False}
    return w8a8_fp8.w8a8_fp8, own | {"stored": stored, "scale": scale} | more


def of_moe(bits=4, asymmetric=True, codes=torch.int8, tile=(1, 32), x=BF16):
    found = moe.prepare([weight(bits, codes=codes, asymmetric=asymmetric, tile=tile)] * 3, 3)
    slots, expert_of_tile = moe_routing.sort_by_expert(torch.zeros(M, 1, dtype=torch.int32), 3, 16)
    scale = None if x == BF16 else torch.ones(M, 2 if tile == (128, 128) else 1)
    names = ("x", "x_scale", "stored", "scale", "zero", "slots", "tiles", "pairs", "n", "group", "out")
    values = (torch.zeros(M, K).to(x), scale, *found[:3], slots, expert_of_tile, M, N, found.group, BF16)
    return moe.moe_linear, dict(zip(names, values, strict=True))


CALLS = {
    "w4a16": of_weight_only(bits=4, asymmetric=True),
    "w4a16 channel": of_weight_only(bits=4, group=0),
    "w8a16": of_weight_only(bits=8, asymmetric=True),
    "w8a16 fp8": of_weight_only(bits=8, group=0, codes=E4M3),
    "w4a8": of_w4a8(),
    "w4a8 zero points": of_w4a8(with_zero=False, asymmetric=True),
    "w4a8 channel": of_w4a8(group=0),
    "w8a8_int8": of_int8(),
    "w8a8_fp8": of_fp8(),
    "w8a8_fp8 blocks": of_fp8((128, 128)),
    "moe int4": of_moe(),
    "moe fp8": of_moe(8, False, E4M3, (1, K), E4M3),
    "moe blocks": of_moe(8, False, E4M3, (128, 128), E4M3),
}
TENSORS = [
    (call, name)
    for call, (_, arguments) in CALLS.items()
    for name, value in arguments.items()
    if isinstance(value, torch.Tensor)
]


def run(call, **replaced):
    operator, arguments = CALLS[call]
    return for_device(operator, CPU)(*(arguments | replaced).values())


@pytest.mark.parametrize("call", CALLS)
def test_what_is_right_is_taken(call):
    assert run(call).shape == (M, N)


@pytest.mark.parametrize(("call", "name"), TENSORS)
def test_a_tensor_on_another_device_is_refused(call, name):
    if name != "x":
        with pytest.raises(AssertionError, match="on meta"):
            run(call, **{name: CALLS[call][1][name].to("meta")})


@pytest.mark.parametrize(("call", "name"), TENSORS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.uint8])
def test_a_tensor_of_another_dtype_is_refused(call, name, dtype):
    with pytest.raises(AssertionError):
        run(call, **{name: CALLS[call][1][name].to(dtype)})


@pytest.mark.parametrize(("call", "name"), TENSORS)
def test_a_tensor_of_another_shape_is_refused(call, name):
    tensor = CALLS[call][1][name]
    for other in (tensor[: min(len(tensor), N) - 1], tensor.unsqueeze(0)):
        if name != "x" or other.ndim > 2:
            with pytest.raises((AssertionError, ValueError)):
                run(call, **{name: other})


@pytest.mark.parametrize(("call", "name"), TENSORS)
def test_a_tensor_with_gaps_is_refused(call, name):
    tensor = CALLS[call][1][name]
    if name not in ("x", "x_scale", "x_zero"):  # which are made contiguous
        last = tensor.ndim - 1
        gaps = torch.stack((tensor.view(torch.int8) if tensor.dtype == E4M3 else tensor,) * 2, dim=last + 1)
        with pytest.raises(AssertionError):
            run(call, **{name: gaps.view(tensor.dtype).select(last + 1, 0)})


@pytest.mark.parametrize("call", CALLS)
def test_a_weight_without_its_scale_is_refused(call):
    with pytest.raises((AssertionError, AttributeError)):
        run(call, scale=None)


@pytest.mark.parametrize("call", ["w4a16", "w8a16", "w4a8", "moe int4"])
@pytest.mark.parametrize("group", [16, 48, 64, 256, -32, 0])
def test_groups_are_those_of_the_scales(call, group):
    with pytest.raises(AssertionError):
        run(call, group=group)


def test_zero_points_are_in_groups():
    for call in ("w4a16 channel", "w4a8 channel", "w8a16 fp8"):
        scale = CALLS[call][1]["scale"]
        with pytest.raises(AssertionError, match="zero points are in groups"):
            run(call, zero=torch.zeros_like(scale, dtype=torch.int8))


def test_zero_points_of_x_come_with_sums():
    with pytest.raises(AssertionError, match="sums of the weight's rows"):
        run("w4a8", row_sum=None)


def test_a_weight_in_16_bits_has_no_scales():
    stored = strip_weight.prepare_dense(torch.ones(N, K, dtype=BF16)).stored
    with pytest.raises(AssertionError, match="weights in 16 bits have no scales"):
        run("w4a16 channel", stored=stored, bits=16)
    assert run("w4a16 channel", stored=stored, bits=16, scale=None).shape == (M, N)


def test_sums_that_could_overflow_are_refused_when_a_weight_is_laid_out():
    wide = LinearWeight(torch.zeros(1, 1 << 16, dtype=torch.int8), torch.ones(1, 1), None, (1, 1 << 16), 8)
    with pytest.raises(AssertionError, match="65536 columns may overflow"):
        w8a8_int8.prepare(wide)
