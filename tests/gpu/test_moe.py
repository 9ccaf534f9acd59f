"""Products for experts against float64, and the sorting of tokens against torch."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: it comes with CUDA builds of torch")

from quantkit_kernels import moe, moe_routing
from quantkit_kernels.weight import LinearWeight
from tests.gpu.triton_device import generator, poisoned, side_by_side  # noqa: F401

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.usefixtures("poisoned"),
]
BF16, FP16, FP8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn


def random_experts(num_experts, n, k, kind, *, group=0, asymmetric=False, scale_dtype=torch.float32):
    """Weights on the device, and float64 [E, N, K] of them."""
    draw, weights, values = generator(1), [], []
    tile = (128, 128) if kind == "fp8" and group else (1, group or k)
    grid = (-(-n // tile[0]), -(-k // tile[1]))
    by_weight = torch.arange(n)[:, None] // tile[0], torch.arange(k)[None, :] // tile[1]
    for _ in range(num_experts):
        if kind == "fp8":
            codes = torch.randn(n, k, generator=draw).mul(100).clamp(-448, 448).to(FP8)
        else:
            codes = torch.randint(-8, 8, (n, k), generator=draw, dtype=torch.int8)
        scale = (torch.rand(grid, generator=draw) + 0.1).mul(0.01).to(scale_dtype)
        zero = torch.randint(-8, 8, grid, generator=draw, dtype=torch.int8) if asymmetric else None
        on_device = None if zero is None else zero.cuda()
        weights.append(LinearWeight(codes.cuda(), scale.cuda(), on_device, tile, 8 if kind == "fp8" else 4))
        w = codes.double() - (0 if zero is None else zero.double()[by_weight])
        values.append((w * scale.double()[by_weight]).cuda())
    return moe.prepare(weights, num_experts), torch.stack(values)


def random_dense(num_experts, n, k, dtype):
    """16-bit weights on the device, and float64 [E, N, K] of them."""
    w = torch.randn(num_experts, n, k, generator=generator(1)).to(dtype).cuda()
    return moe.prepare_dense(w, num_experts), w.double()


def random_ids(num_tokens, per_token, num_experts, *, seed=2, few=False):
    """Distinct experts for each token; with `few` only the first `per_token` get any."""
    order = torch.rand(num_tokens, per_token if few else num_experts, generator=generator(seed)).argsort(
        dim=1
    )
    return order[:, :per_token].contiguous().cuda()


def check(y, x, w, expert_P, row_P, *, sum_bits=24):
    """One rounding of the output, three of scales, and sums kept to `sum_bits` bits of their largest."""
    assert torch.isfinite(y).all()
    for expert in expert_P.unique().tolist():
        mine = expert_P == expert
        expected, magnitude = x[row_P[mine]] @ w[expert].T, x[row_P[mine]].abs() @ w[expert].abs().T
        sums, half = (2.0**-21 + 2.0 ** (3 - sum_bits)) * magnitude, torch.finfo(y.dtype).eps / 2
        bound = half * expected.abs() + (1 + half) * sums
        error = (y[mine].double() - expected).abs()
        assert (error <= bound).all(), f"expert {expert}: {(error / bound).max():.2f} of the bound"


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP16, torch.float32])
@pytest.mark.parametrize(
    ("num_tokens", "per_token", "num_experts"), [(1, 2, 8), (33, 4, 60), (4096, 8, 128), (5, 1, 1)]
)
def test_the_largest_scores_are_chosen(num_tokens, per_token, num_experts, dtype, normalized):
    scores = (torch.randn(num_tokens, num_experts, generator=generator(1)) * 4).to(dtype).cuda()
    expert, weight = moe_routing.choose_experts(scores, per_token, normalized)
    plain_expert, plain_weight = moe_routing.plain_choose(scores, per_token, normalized)
    assert torch.equal(scores.gather(1, expert.long()), scores.gather(1, plain_expert.long())), "but for ties"
    assert (expert.sort(dim=1).values.diff(dim=1) > 0).all(), "each once"
    torch.testing.assert_close(weight, plain_weight, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("rows", [16, 64])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("num_experts", [8, 60, 128])
@pytest.mark.parametrize(("num_tokens", "per_token"), [(1, 1), (1, 8), (7, 2), (300, 8), (4096, 4)])
def test_pairs_are_sorted_by_expert(num_tokens, per_token, num_experts, dtype, rows):
    ids = random_ids(num_tokens, per_token, num_experts).to(dtype)
    slots, expert_of_tile = moe_routing.sort_by_expert(ids, num_experts, rows)
    expected_slots, expected_tiles = moe_routing.plain_sort(ids.cpu(), num_experts, rows)
    assert torch.equal(expert_of_tile.cpu(), expected_tiles)
    used = rows * int((expected_tiles >= 0).sum())
    assert torch.equal(slots.cpu()[:used], expected_slots[:used])


@pytest.mark.parametrize("wrong", [-1, 60, 63, 64, 67, 2**32 + 3])
def test_experts_that_there_are_not_get_no_pairs(wrong):
    ids = random_ids(300, 8, 60)
    ids[::7, 5] = wrong
    slots, expert_of_tile = moe_routing.sort_by_expert(ids, 60, 16)
    is_used = (expert_of_tile >= 0).repeat_interleave(16)
    placed = slots[is_used]
    placed = placed[placed < ids.numel()]
    is_right = (ids.flatten() >= 0) & (ids.flatten() < 60)
    assert torch.equal(placed.long().sort().values, is_right.nonzero()[:, 0])
    assert torch.equal(
        expert_of_tile.repeat_interleave(16)[is_used & (slots < ids.numel())],
        ids.flatten()[placed.long()].to(torch.int32),
    )


@pytest.mark.parametrize("normalized", [False, True])
def test_scores_that_are_no_numbers_choose_among_the_experts(normalized):
    scores = torch.randn(9, 60, generator=generator(1)).to(BF16).cuda()
    expected = moe_routing.choose_experts(scores, 4, normalized)
    scores[3] = torch.nan
    expert, weight = moe_routing.choose_experts(scores, 4, normalized)
    assert ((expert >= 0) & (expert < 60)).all()
    assert weight[3].isnan().all()
    others = [row for row in range(9) if row != 3]
    assert torch.equal(expert[others], expected[0][others]) and torch.equal(
        weight[others], expected[1][others]
    )


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("num_tokens", "per_token", "n"), [(1, 8, 4096), (33, 2, 77), (500, 4, 2880)])
def test_experts_are_combined_in_order(num_tokens, per_token, n, dtype):
    y = torch.randn(num_tokens * per_token, n, generator=generator(3)).to(dtype).cuda()
    weight = torch.rand(num_tokens, per_token, generator=generator(4)).cuda()
    out = moe_routing.combine(y, weight, dtype)
    terms = y.double().view(num_tokens, per_token, n) * weight.double()[:, :, None]
    sums, half = per_token * 2.0**-24 * terms.abs().sum(dim=1), torch.finfo(dtype).eps / 2
    bound = half * terms.sum(dim=1).abs() + (1 + half) * sums + half * torch.finfo(dtype).smallest_normal
    assert ((out.double() - terms.sum(dim=1)).abs() <= bound).all()
    assert torch.equal(out, moe_routing.combine(y, weight, dtype))


CASES = [
    ("int4", 128, False, BF16), ("int4", 128, True, BF16), ("int4", 128, False, FP16), ("int4", 64, False, BF16),
    ("int4", 32, False, FP16), ("int4", 32, True, BF16), ("int4", 0, False, BF16), ("int4", 0, True, FP16),
    ("fp8", 0, False, BF16), ("fp8", 0, False, FP16), ("fp8", 128, False, BF16),
    ("dense", 0, False, BF16), ("dense", 0, False, FP16),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "group", "asymmetric", "dtype"), CASES)
@pytest.mark.parametrize(("n", "k"), [(256, 384), (129, 200)])
def test_16_bit_inputs(n, k, kind, group, asymmetric, dtype):
    num_experts = 8
    if kind == "dense":
        weight, w = random_dense(num_experts, n, k, dtype)
    else:
        weight, w = random_experts(num_experts, n, k, kind, group=group, asymmetric=asymmetric)
    for num_tokens, per_token, rows, few in (
        (1, 2, 16, False),
        (40, 2, 16, True),
        (200, 4, 64, False),
        (700, 2, 128, False),
    ):
        ids = random_ids(num_tokens, per_token, num_experts, few=few)
        routed = moe_routing.sort_by_expert(ids, num_experts, rows)
        row_P = torch.arange(ids.numel(), device="cuda") // per_token
        x = torch.randn(num_tokens, k, generator=generator(5)).to(dtype).cuda()
        y = moe.multiply(x, None, weight, *routed, ids.numel(), dtype)
        check(y, x.double(), w, ids.flatten(), row_P)
        x = (
            torch.randn(ids.numel(), k, generator=generator(6)).to(dtype).cuda()
        )  # of pairs, as after the first product
        y = moe.multiply(x, None, weight, *routed, ids.numel(), dtype)
        check(y, x.double(), w, ids.flatten(), torch.arange(ids.numel(), device="cuda"))


@pytest.mark.parametrize("group", [0, 128])
@pytest.mark.parametrize(("n", "k"), [(256, 384), (129, 200)])
def test_fp8_inputs(n, k, group):
    num_experts = 16
    weight, w = random_experts(num_experts, n, k, "fp8", group=group)
    for num_tokens, per_token, rows in ((1, 8, 16), (37, 3, 16), (300, 8, 128)):
        ids = random_ids(num_tokens, per_token, num_experts)
        routed = moe_routing.sort_by_expert(ids, num_experts, rows)
        row_P = torch.arange(ids.numel(), device="cuda") // per_token
        codes = torch.randn(num_tokens, k, generator=generator(5)).mul(100).clamp(-448, 448).to(FP8).cuda()
        scale = (torch.rand(num_tokens, -(-k // 128) if group else 1, generator=generator(6)) + 0.1).cuda()
        by_column = scale.double().repeat_interleave(128, dim=1)[:, :k] if group else scale.double()
        y = moe.multiply(codes, scale, weight, *routed, ids.numel(), BF16)
        check(y, codes.double() * by_column, w, ids.flatten(), row_P, sum_bits=13)


def test_weights_beyond_two_billion_codes():
    num_experts, n, k = 128, 1536, 14336
    stored = torch.zeros(num_experts, n, k, dtype=torch.int8, device="cuda").view(FP8)
    stored[-1] = torch.randn(n, k, generator=generator(1)).to(FP8).cuda()
    weight = moe.ExpertWeight(stored, torch.ones(num_experts, n, device="cuda"), None, (n, k), 0)
    ids = torch.tensor([[num_experts - 1], [0]], device="cuda")
    x = torch.randn(2, k, generator=generator(2)).to(BF16).cuda()
    y = moe.multiply(x, None, weight, *moe_routing.sort_by_expert(ids, num_experts, 16), 2, BF16)
    check(
        y[:1],
        x.double(),
        stored[-1:].double(),
        torch.zeros(1, dtype=torch.long),
        torch.zeros(1, dtype=torch.long),
    )
    assert not y[1].any()


def test_one_graph_for_every_routing():
    num_experts, per_token, num_tokens, n, k = 16, 4, 24, 256, 256
    weight, w = random_experts(num_experts, n, k, "int4", group=128)
    ids = random_ids(num_tokens, per_token, num_experts)
    gates = torch.rand(num_tokens, per_token, generator=generator(7)).cuda()
    x = torch.randn(num_tokens, k, generator=generator(8)).to(BF16).cuda()

    def layer():
        routed = moe_routing.sort_by_expert(ids, num_experts, 16)
        y = moe.multiply(x, None, weight, *routed, ids.numel(), BF16)
        return y, moe_routing.combine(y, gates, BF16)

    layer()
    graph = torch.cuda.CUDAGraph()
    with side_by_side(), torch.cuda.graph(graph):
        y, out = layer()
    row_P = torch.arange(ids.numel(), device="cuda") // per_token
    for seed, few in ((11, False), (12, True), (13, False)):
        ids.copy_(random_ids(num_tokens, per_token, num_experts, seed=seed, few=few))
        graph.replay()
        check(y, x.double(), w, ids.flatten(), row_P)
        first = out.clone()
        graph.replay()
        assert torch.equal(out, first)


def test_operators_have_honest_fakes():
    checks = ("test_schema", "test_faketensor")
    weight, _ = random_experts(8, 64, 128, "int4", group=128)
    ids = random_ids(20, 2, 8)
    torch.library.opcheck(moe_routing.sort_by_expert, (ids, 8, 16), test_utils=checks)
    x, routed = torch.randn(20, 128, device="cuda").to(BF16), moe_routing.sort_by_expert(ids, 8, 16)
    args = (x, None, weight.stored, weight.scale, None, *routed, 40, 64, weight.group, BF16)
    torch.library.opcheck(moe.moe_linear, args, test_utils=checks)
    y, gates = torch.randn(40, 64, device="cuda"), torch.rand(20, 2, device="cuda")
    torch.library.opcheck(moe_routing.combine, (y, gates, BF16), test_utils=checks)
