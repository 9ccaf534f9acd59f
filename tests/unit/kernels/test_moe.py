"""Products for experts without a GPU: the operators on a CPU are the definitions, and kernels compile."""

import pytest
import torch

from quantkit_kernels import moe, moe_routing
from quantkit_kernels.weight import LinearWeight
from tests.triton_aot import CAPABILITIES, compile_for

pytest.importorskip("triton", reason="triton is not installed: it comes with CUDA builds of torch")

from quantkit_kernels import moe_kernel, moe_routing_kernel

NUM_EXPERTS = 6
MMA = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "MMA", 120: "HMMA"}


def generator(seed):
    return torch.Generator().manual_seed(seed)


def random_experts(n, k, kind, *, group=0, asymmetric=False):
    draw, weights, values = generator(1), [], []
    tile = (128, 128) if kind == "fp8" and group else (1, group or k)
    grid = (-(-n // tile[0]), -(-k // tile[1]))
    by_weight = torch.arange(n)[:, None] // tile[0], torch.arange(k)[None, :] // tile[1]
    for _ in range(NUM_EXPERTS):
        codes = torch.randint(-8, 8, (n, k), generator=draw, dtype=torch.int8)
        if kind == "fp8":
            codes = (torch.randn(n, k, generator=draw) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
        scale = torch.rand(grid, generator=draw) * 0.01 + 0.001
        zero = torch.randint(-8, 8, grid, generator=draw, dtype=torch.int8) if asymmetric else None
        weights.append(LinearWeight(codes, scale, zero, tile, 8 if kind == "fp8" else 4))
        w = codes.double() - (0 if zero is None else zero.double()[by_weight])
        values.append(w * scale.double()[by_weight])
    return moe.prepare(weights, NUM_EXPERTS), torch.stack(values)


def random_ids(num_tokens, per_token):
    return (
        torch.rand(num_tokens, NUM_EXPERTS, generator=generator(2)).argsort(dim=1)[:, :per_token].contiguous()
    )


@pytest.mark.parametrize("normalized", [False, True])
def test_the_largest_are_chosen_with_their_share_of_the_softmax(normalized):
    scores = torch.randn(40, NUM_EXPERTS, generator=generator(1)).bfloat16()
    expert, weight = moe_routing.choose_experts(scores, 3, normalized)
    probability = torch.softmax(scores.double(), dim=1)
    chosen = probability.gather(1, expert.long())
    assert torch.equal(chosen, probability.sort(dim=1, descending=True).values[:, :3])
    total = chosen.sum(dim=1, keepdim=True) if normalized else 1
    torch.testing.assert_close(weight.double(), chosen / total, rtol=1e-6, atol=1e-9)
    torch.library.opcheck(
        moe_routing.choose_experts, (scores, 3, normalized), test_utils=("test_schema", "test_faketensor")
    )


def test_every_pair_has_one_slot_in_a_tile_of_its_expert():
    for num_tokens, per_token, rows in ((1, 1, 16), (40, 3, 16), (7, 6, 32)):
        ids = random_ids(num_tokens, per_token)
        slots, expert_of_tile = moe_routing.sort_by_expert(ids, NUM_EXPERTS, rows)
        assert len(expert_of_tile) == moe_routing.max_tiles(ids.numel(), NUM_EXPERTS, rows)
        used = slots < ids.numel()
        assert torch.equal(slots[used].sort().values, torch.arange(ids.numel(), dtype=torch.int32))
        expert_of_slot = expert_of_tile.repeat_interleave(rows)
        assert torch.equal(expert_of_slot[used], ids.flatten()[slots[used].long()].to(torch.int32))


@pytest.mark.parametrize("wrong", [-1, NUM_EXPERTS, NUM_EXPERTS + 1])
def test_experts_that_there_are_not_are_named(wrong):
    ids = random_ids(7, 2)
    ids[3, 1] = wrong
    with pytest.raises(AssertionError, match=f"of {NUM_EXPERTS}"):
        moe_routing.sort_by_expert(ids, NUM_EXPERTS, 16)


def test_no_token_is_no_work():
    weight, _ = random_experts(33, 200, "int4")
    slots, expert_of_tile = moe_routing.sort_by_expert(random_ids(0, 2), NUM_EXPERTS, moe.rows_for(0, weight))
    x = torch.empty(0, 200, dtype=torch.bfloat16)
    y = moe.multiply(x, None, weight, slots, expert_of_tile, 0, torch.bfloat16)
    assert y.shape == (0, 33)
    assert moe_routing.combine(y, torch.empty(0, 2), torch.bfloat16).shape == (0, 33)


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("group", [0, 32, 64, 128])
def test_int4_is_its_definition(group, asymmetric):
    weight, w = random_experts(33, 200, "int4", group=group, asymmetric=asymmetric)
    check_products(weight, w, torch.randn(9, 200, generator=generator(3)).bfloat16())


def test_16_bit_weights_are_their_definition():
    w = torch.randn(NUM_EXPERTS, 33, 200, generator=generator(1)).bfloat16()
    weight = moe.prepare_dense(w, NUM_EXPERTS)
    check_products(weight, w.double(), torch.randn(9, 200, generator=generator(3)).bfloat16())


@pytest.mark.parametrize("group", [0, 128])
def test_fp8_is_its_definition(group):
    weight, w = random_experts(130, 200, "fp8", group=group)
    check_products(weight, w, torch.randn(9, 200, generator=generator(3)).half())
    codes = torch.randn(9, 200, generator=generator(4)).to(torch.float8_e4m3fn)
    scale = torch.rand(9, 2 if group else 1, generator=generator(5)) + 0.1
    by_column = scale.double().repeat_interleave(128, dim=1)[:, :200] if group else scale.double()
    check_products(weight, w, codes, scale, codes.double() * by_column)


def check_products(weight, w, x, scale=None, values=None):
    """Rows of tokens, and rows of pairs."""
    ids = random_ids(len(x), 2)
    routed = moe_routing.sort_by_expert(ids, NUM_EXPERTS, 16)
    values = x.double() if values is None else values
    y = moe.multiply(x, scale, weight, *routed, ids.numel(), torch.float32)
    assert_close(y, values.repeat_interleave(2, dim=0), w[ids.flatten()])
    one_each = ids[:, :1].contiguous()
    routed = moe_routing.sort_by_expert(one_each, NUM_EXPERTS, 16)
    y = moe.multiply(x, scale, weight, *routed, len(x), torch.float32)
    assert_close(y, values, w[one_each.flatten()])


def assert_close(y, x_PK, w_PNK):
    """float32 sums."""
    expected = (w_PNK @ x_PK[:, :, None])[:, :, 0]
    bound = 2.0**-20 * (w_PNK.abs() @ x_PK.abs()[:, :, None])[:, :, 0]
    assert ((y.double() - expected).abs() <= bound).all()


def test_experts_are_weighted_in_float32():
    y, gates = torch.randn(10, 7, generator=generator(6)).bfloat16(), torch.rand(5, 2, generator=generator(7))
    out = moe_routing.combine(y, gates, torch.float32)
    expected = (y.double().view(5, 2, 7) * gates.double()[:, :, None]).sum(dim=1)
    assert torch.allclose(out.double(), expected, rtol=1e-6, atol=1e-6)


def test_a_group_of_all_columns_is_a_scale_per_row():
    weight, w = random_experts(32, 128, "int4", group=128)
    assert weight.group == 0
    check_products(weight, w, torch.randn(9, 128, generator=generator(3)).half())
    ids = random_ids(9, 2)
    routed = moe_routing.sort_by_expert(ids, NUM_EXPERTS, 16)
    args = (
        torch.randn(9, 128).half(),
        None,
        weight.stored,
        weight.scale,
        None,
        *routed,
        18,
        32,
        weight.group,
        torch.half,
    )
    torch.library.opcheck(moe.moe_linear, args, test_utils=("test_schema", "test_faketensor"))


def test_what_is_wrong_is_named():
    weight, _ = random_experts(32, 64, "int4", group=32)
    routed = moe_routing.sort_by_expert(random_ids(3, 2), NUM_EXPERTS, 16)
    with pytest.raises(AssertionError, match="7 pairs for 3 rows"):
        moe.multiply(torch.zeros(3, 64).half(), None, weight, *routed, 7, torch.half)
    with pytest.raises(AssertionError, match=r"x of torch\.float32"):
        moe.multiply(torch.zeros(3, 64), None, weight, *routed, 6, torch.half)


def compile_grouped(capability, kind, x, *, group=128, asymmetric=False, rows=16):
    counts = ("num_pairs", "pairs_per_row", "num_outputs", "num_cols", "num_groups", "x_scale_step")
    multiples = ("num_outputs", "num_cols", "stride_w", "stride_scale", "stride_x", "stride_y")
    numbers = {*counts, *multiples}
    is_int4, is_codes, is_dense = kind == "i8", x == "fp8e4nv", kind == x == "bf16"
    types = dict.fromkeys(numbers, "i32") | {"y": "*bf16", "x": f"*{x}", "w": f"*{kind}"}
    types |= {"slots": "*i32", "expert_of_tile": "*i32", "w_scale": "*bf16" if is_int4 and group else "*fp32"}
    constants = {"IS_INT4": is_int4, "GROUP": group}
    for name, kind_of, is_there in (
        ("x_scale", "*fp32", is_codes), ("w_zero_point", "*i8", asymmetric), ("w_scale", types["w_scale"], not is_dense)
    ):  # fmt: skip
        if is_there:
            types[name] = kind_of
        else:
            types.pop(name, None)
            constants[name] = None
    w_dtype = torch.int32 if is_int4 else torch.bfloat16 if is_dense else torch.float8_e4m3fn
    x_dtype = torch.float8_e4m3fn if is_codes else torch.bfloat16
    tile = moe_kernel.tile_for(rows, group, w_dtype, x_dtype, is_hopper=capability == 90)
    constants |= {"BN": tile.rows_w, "BM": rows, "BK": tile.cols, "STAGES": tile.num_stages}
    return compile_for(
        moe_kernel.grouped_kernel, capability, types, constants, tile.num_warps, multiples=multiples,
        num_stages=tile.num_stages,
    )  # fmt: skip


def assert_in_registers(resources, mma):
    assert "LDL" not in resources.sass, "what was spilled is read again"
    assert mma in resources.sass


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_compile(capability):
    grouped = compile_grouped(capability, "i8", "bf16", rows=64, asymmetric=True)
    assert_in_registers(grouped, MMA[capability])
    types = {
        "expert_ids": "*i64",
        "slots": "*i32",
        "expert_of_tile": "*i32",
        "num_pairs": "i32",
        "max_tiles": "i32",
    }
    constants = {"EXPERTS": 128, "ROWS": 16, "CHUNK": moe_routing_kernel.CHUNK}
    assert_in_registers(compile_for(moe_routing_kernel.sort_kernel, capability, types, constants, 8), "")
    types = {"experts": "*i32", "weights": "*fp32", "scores": "*bf16", "stride_scores": "i32"}
    constants = {"NUM_EXPERTS": 60, "NUM_CHOSEN": 6, "NORMALIZED": True, "BLOCK": 64, "SLOTS": 8}
    assert_in_registers(compile_for(moe_routing_kernel.choose_kernel, capability, types, constants, 1), "")
    types = dict.fromkeys(("num_features", "stride_y", "stride_weight", "stride_out"), "i32")
    types |= {"out": "*bf16", "y": "*bf16", "weight": "*fp32"}
    constants = {"PAIRS": 8, "COLUMNS": moe_routing_kernel.COLUMNS}
    assert_in_registers(compile_for(moe_routing_kernel.combine_kernel, capability, types, constants, 4), "")


def test_fp8_kernels_compile():
    for x, group, mma in (("fp8e4nv", 0, "QGMMA"), ("fp8e4nv", 128, "QGMMA"), ("bf16", 128, "HGMMA")):
        assert_in_registers(compile_grouped(90, "fp8e4nv", x, group=group), mma)


@pytest.mark.parametrize("rows", [16, 128])
@pytest.mark.parametrize("capability", [80, 90])
def test_16_bit_kernels_compile(capability, rows):
    resources = compile_grouped(capability, "bf16", "bf16", group=0, rows=rows)
    assert_in_registers(resources, MMA[capability])
    assert resources.shared <= (227 if capability == 90 else 99) * 1024, "8.6 and 8.9 have 99 KB"


@pytest.mark.parametrize("group", [0, 64])
def test_int4_goes_to_the_tensor_core_from_registers(group):
    """Between products nothing but x, whose columns change places, is stored to shared memory."""
    resources = compile_grouped(90, "i8", "fp16", group=group)
    assert_in_registers(resources, "HGMMA")
    in_loop = resources.sass[resources.sass.index("HGMMA") :]
    assert in_loop[: in_loop.rindex("HGMMA")].count("STS.") == 0
