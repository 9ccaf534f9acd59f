"""What stands between the products: values against float64, codes against the definitions, bit by bit."""

import math

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: it comes with CUDA builds of torch")

from quantkit_kernels import (
    embedding,
    embedding_kernel,
    hadamard,
    hadamard_kernel,
    norm_kernel,
    norm_quant,
    rope_kernel,
    row_codes,
    row_codes_kernel,
    sampling,
    sampling_kernel,
    silu_kernel,
    silu_quant,
)
from quantkit_kernels.norm_quant import Norm
from quantkit_kernels.rope_append import Append, append
from quantkit_kernels.row_codes import Codes
from tests.gpu.triton_device import DEVICE, IS_INTERPRETED, generator, needs_gpu, needs_kernels, poisoned  # noqa: F401

pytestmark = [*needs_kernels, pytest.mark.usefixtures("poisoned")]

# The interpreter has neither bfloat16 nor float8 to be trusted; in float16 it does what a GPU does.
DTYPES = [torch.float16, torch.float32] if IS_INTERPRETED else [torch.bfloat16, torch.float16, torch.float32]
MODEL_DTYPE = DTYPES[0]
CODES = [torch.int8, torch.float8_e4m3fn]
CASES = [(5 if IS_INTERPRETED else 257, 576, dtype) for dtype in DTYPES]
CASES += [
    (num_tokens, num_features, MODEL_DTYPE)
    for num_tokens, num_features in (
        [(1, 64), (3, 129)]
        if IS_INTERPRETED
        else [(1, 4096), (3, 129), (1025, 5120), (33, 12289), (7, 16384)]
    )
]


def rows(num_tokens, num_features, dtype, seed=0, padding=8):
    """Random rows in a wider tensor whose other columns are NaN, with channels of very different size."""
    x = torch.randn(num_tokens, num_features, generator=generator(seed))
    x *= torch.logspace(-2, 1, num_features)
    whole = torch.full((num_tokens, num_features + 2 * padding), torch.nan, dtype=dtype, device=DEVICE)
    whole[:, padding : padding + num_features] = x.to(DEVICE, dtype)
    return whole[:, padding : padding + num_features]


def codes_by_definition(x, codes):
    """`row_codes.encode_rows` on the CPU: the tests of the CPU hold it to `schemes.activation`."""
    on_cpu = (None if t is None else t.cpu() for t in (codes.static_scale, codes.zero_point))
    return tuple(t.to(DEVICE) for t in row_codes.encode_rows(x.cpu(), Codes(*codes[:2], *on_cpu)))


def same(got, expected):
    """Equal bit by bit; tensors may have 8-bit floats."""
    return all(
        torch.equal(
            a.view(torch.int8) if a.itemsize == 1 else a, b.view(torch.int8) if b.itemsize == 1 else b
        )
        for a, b in zip(got, expected, strict=True)
    )


def assert_within(got, exact, relative):
    """|got − exact| ≤ relative · |exact| + the smallest number of the dtype."""
    bound = relative * exact.abs() + torch.finfo(got.dtype).smallest_normal
    excess = ((got.double() - exact).abs() / bound).max().item()
    assert excess <= 1, f"error is {excess:.2f} times the bound"


def norm_bound(dtype, num_features):
    """Two roundings to dtype and float32's: a sum of squares, rsqrt, three products."""
    return 1.01 * torch.finfo(dtype).eps + (num_features / 2 + 8) * torch.finfo(torch.float32).eps


@pytest.mark.parametrize(("num_tokens", "num_features", "dtype"), CASES)
def test_norm_is_that_of_float64(num_tokens, num_features, dtype):
    x = rows(num_tokens, num_features, dtype)
    weight = 1 + torch.randn(num_features, generator=generator(1)).to(DEVICE, dtype) / 4
    for plus_one in (False, True):
        for residual in (None, rows(num_tokens, num_features, dtype, seed=2)):
            total = x if residual is None else x + residual
            wide = total.double()
            exact = wide * (wide.square().mean(dim=1, keepdim=True) + 1e-6).rsqrt()
            exact = exact * ((1 + weight.double()) if plus_one else weight.double())
            got = norm_kernel.launch(x, residual, Norm(weight, 1e-6, plus_one))
            assert_within(got, exact, norm_bound(dtype, num_features))
            assert residual is None or torch.equal(residual, total)


@pytest.mark.parametrize(("num_tokens", "num_features", "dtype"), CASES[:3])
def test_two_norms_are_one_after_the_other(num_tokens, num_features, dtype):
    x, residual = (rows(num_tokens, num_features, dtype, seed=seed) for seed in (0, 2))
    weight, inner = (1 + rows(2, num_features, dtype, seed=1).contiguous() / 4).unbind()
    for plus_one in (False, True):
        expected_sum, got_sum = residual.clone(), residual.clone()
        normed = norm_kernel.launch(x, None, Norm(inner, 1e-6, plus_one))
        expected = norm_kernel.launch(normed, expected_sum, Norm(weight, 1e-6, plus_one))
        got = norm_kernel.launch(x, got_sum, Norm(weight, 1e-6, plus_one, inner))
        assert torch.equal(got, expected) and torch.equal(got_sum, expected_sum)


@pytest.mark.parametrize("code_dtype", CODES)
@pytest.mark.parametrize(("num_tokens", "num_features", "dtype"), CASES)
def test_codes_of_a_norm_are_those_of_its_values(num_tokens, num_features, dtype, code_dtype):
    x, weight = rows(num_tokens, num_features, dtype), torch.ones(num_features, dtype=dtype, device=DEVICE)
    x[-1] = 0
    residual = rows(num_tokens, num_features, dtype, seed=2)
    residual[-1] = 0
    normed = norm_kernel.launch(x, residual.clone(), Norm(weight, 1e-6, False))
    scale, zero_point = (torch.tensor([value], device=DEVICE) for value in (0.0123, 3.0))
    for group in (0, *(size for size in (64, 128) if num_features % size == 0)):
        got = norm_kernel.launch_codes(
            x, residual.clone(), Norm(weight, 1e-6), Codes(code_dtype, group, None, None)
        )
        assert same(got, codes_by_definition(normed, Codes(code_dtype, group)))
    for zero in (None, zero_point.to(torch.int8)) if code_dtype == torch.int8 else (None,):
        got = norm_kernel.launch_codes(
            x, residual.clone(), Norm(weight, 1e-6), Codes(code_dtype, 0, scale, zero)
        )
        assert same(got, codes_by_definition(normed, Codes(code_dtype, 0, scale, zero)))


@pytest.mark.parametrize("code_dtype", CODES)
@pytest.mark.parametrize(("num_tokens", "num_features", "dtype"), CASES)
def test_rows_are_encoded_by_definition(num_tokens, num_features, dtype, code_dtype):
    x = rows(num_tokens, num_features, dtype)
    x *= torch.logspace(-3, 3, num_tokens, device=DEVICE)[:, None].to(dtype)
    for group in (0, *(size for size in (32, 128) if num_features % size == 0)):
        got = row_codes_kernel.launch(x, Codes(code_dtype, group))
        assert same(got, codes_by_definition(x, Codes(code_dtype, group)))


@pytest.mark.parametrize("code_dtype", CODES)
def test_what_is_not_a_number_shows_in_the_scale_of_its_row(code_dtype):
    x = rows(4, 128, MODEL_DTYPE)
    x[1, 77] = torch.nan
    for group, wrong in (
        (0, [[False], [True], [False], [False]]),
        (64, [[False] * 2, [False, True], *[[False] * 2] * 2]),
    ):
        _, scale = row_codes_kernel.launch(x, Codes(code_dtype, group))
        assert scale.isnan().tolist() == wrong


@needs_gpu
@pytest.mark.parametrize("code_dtype", CODES)
def test_every_quotient_of_bfloat16_is_rounded_like_a_division(code_dtype):
    significands = torch.arange(128, 256, device=DEVICE) / 128
    for exponent in (-130, -126, -70, -63, -20, 0, 20, 100):
        steps = torch.cat((significands, torch.rand(0, device=DEVICE))).double() * 2.0**exponent
        x = steps[:, None] * torch.cat((significands * 2, significands * 32, -significands * 64))[None, :]
        x = torch.cat((x, steps[:, None] * 127.5), dim=1).bfloat16()
        got = row_codes_kernel.launch(x, Codes(code_dtype, 0))
        assert same(got, codes_by_definition(x, Codes(code_dtype, 0))), exponent


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(
    ("num_tokens", "num_features", "dtype"),
    [*CASES[:-1], (3, 1536 if IS_INTERPRETED else 28672, MODEL_DTYPE)],
)
def test_activation_is_that_of_float64(num_tokens, num_features, dtype, activation):
    gate_up = rows(num_tokens, 2 * num_features, dtype)
    got = silu_kernel.launch(gate_up, activation)
    gate, up = gate_up.double().chunk(2, dim=1)
    exact = silu_quant.activate(torch.cat((gate, up), dim=1), activation)
    # roundings to dtype twice, of a value that exp and the cancellation in 1 + e^−x make no worse than 2^-20 of it
    # where it is not small; below that, of the gate
    small = 2.0**-20 * (gate * up).abs()
    bound = (
        1.01 * torch.finfo(dtype).eps * exact.abs()
        + small
        + torch.finfo(dtype).smallest_normal * (1 + up.abs())
    )
    assert ((got.double() - exact).abs() <= bound).all()
    for code_dtype in CODES:
        for group in (0, *(size for size in (64, 128) if num_features % size == 0)):
            coded = silu_kernel.launch_codes(gate_up, activation, Codes(code_dtype, group, None))
            assert same(coded, codes_by_definition(got, Codes(code_dtype, group)))
        scale = torch.tensor([0.05], device=DEVICE)
        coded = silu_kernel.launch_codes(gate_up, activation, Codes(code_dtype, 0, scale))
        assert same(coded, codes_by_definition(got, Codes(code_dtype, 0, scale)))


@pytest.mark.parametrize("code_dtype", CODES)
@pytest.mark.parametrize("num_features", [8704, 9001] + [14336, 28673] * (not IS_INTERPRETED))
def test_rows_in_parts_have_the_codes_of_whole_rows(num_features, code_dtype):
    gate_up = rows(3, 2 * num_features, MODEL_DTYPE)
    gate_up[1] = 0
    gate_up[2, num_features - 1] = torch.nan
    codes = Codes(code_dtype)
    parts = silu_kernel.launch_codes(gate_up, "silu", codes, few_tokens=3)
    whole = silu_kernel.launch_codes(gate_up, "silu", codes, few_tokens=0)
    assert same([each[:2] for each in parts], [each[:2] for each in whole])
    assert parts[1][2].isnan() and whole[1][2].isnan()


def angles(num_positions, half):
    """Tables of cosines and sines."""
    turn = torch.arange(num_positions)[:, None] / 10000 ** (torch.arange(half) / half)
    return turn.cos().to(DEVICE), turn.sin().to(DEVICE)


HEADS = [(1, 1, 16, 16), (5, 1, 80, 80), (8, 2, 64, 32)] + (
    [] if IS_INTERPRETED else [(32, 8, 128, 128), (28, 4, 128, 64), (16, 8, 256, 256), (12, 12, 96, 48)]
)


@pytest.mark.parametrize("is_normed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[:-1])
@pytest.mark.parametrize(("queries", "heads", "dim", "turned"), HEADS)
@pytest.mark.parametrize("num_tokens", [1, 7] if IS_INTERPRETED else [1, 7, 129, 1000])
def test_rotation_and_pages(num_tokens, queries, heads, dim, turned, dtype, is_normed):
    qkv = rows(num_tokens, (queries + 2 * heads) * dim, dtype)
    cos, sin = angles(97, turned // 2)
    positions = torch.randint(0, 97, (num_tokens,), generator=generator(3)).to(DEVICE)
    num_blocks = num_tokens // 16 + 2
    slots = torch.randperm(num_blocks * 16, generator=generator(4))[:num_tokens].to(DEVICE)
    slots[num_tokens // 2] = -1
    weights = [None, None]
    if is_normed:
        weights = [1 + torch.randn(dim, generator=generator(s)).to(DEVICE, dtype) / 4 for s in (5, 6)]
    shape = (num_blocks, heads, 16, dim)
    unwritten = torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)
    pages = [unwritten.clone(), unwritten.clone()]
    arguments = (qkv, positions, cos, sin, slots.int(), *weights, 1e-6, False)
    got_q = rope_kernel.launch(Append(*arguments, *pages, None, None))

    parts = qkv.double().unflatten(1, (-1, dim)).split((queries, heads, heads), dim=1)
    is_kept = slots >= 0
    block, slot = slots[is_kept] // 16, slots[is_kept] % 16
    for part, weight, got in (
        (parts[0], weights[0], got_q),
        (parts[1], weights[1], pages[0][block, :, slot]),
    ):
        exact, size = by_definition(part, weight, cos.double()[positions], sin.double()[positions])
        if got is not got_q:
            exact, size = exact[is_kept], size[is_kept]
        bound = 1.01 * (1.5 if is_normed else 0.5) * torch.finfo(dtype).eps * size + 2.0**-20 * size
        assert ((got.double() - exact).abs() <= bound + torch.finfo(dtype).smallest_normal).all()
    assert torch.equal(pages[1][block, :, slot], parts[2][is_kept].to(dtype))
    for page in pages:
        written = torch.zeros(num_blocks, 16, dtype=torch.bool, device=DEVICE)
        written[block, slot] = True
        assert page.isnan().all(dim=(1, 3)).eq(~written).all() if page.isnan().any() else written.all()

    for code_dtype in CODES:
        for per_token in (False, True):
            scales = [
                torch.full(shape[:3] if per_token else (heads,), 0.037, device=DEVICE) for _ in range(2)
            ]
            coded = [
                torch.full(shape, 77, dtype=torch.int8, device=DEVICE).view(code_dtype) for _ in range(2)
            ]
            again = rope_kernel.launch(Append(*arguments, *coded, *scales))
            assert torch.equal(again, got_q)
            for page, codes, scale in zip(pages, coded, scales, strict=True):
                expected = torch.full(shape, 77, dtype=torch.int8).view(code_dtype)
                expected_scale = torch.full(scale.shape, 0.037)
                values = page[block, :, slot].cpu()
                append(values, slots[is_kept].cpu(), expected, expected_scale)
                assert same((codes.cpu(), scale.cpu()), (expected, expected_scale))


def by_definition(x_THD, weight_D, cos_TR, sin_TR):
    """Normed and rotated in float64, and the size of what was added for each element."""
    if weight_D is not None:
        x_THD = x_THD * (x_THD.square().mean(dim=2, keepdim=True) + 1e-6).rsqrt() * weight_D.double()
    half = cos_TR.shape[1]
    cos_TR, sin_TR = cos_TR[:, None], sin_TR[:, None]
    first, second, rest = x_THD.split((half, half, x_THD.shape[2] - 2 * half), dim=2)
    exact = torch.cat((first * cos_TR - second * sin_TR, second * cos_TR + first * sin_TR, rest), dim=2)
    sizes = (first * cos_TR).abs() + (second * sin_TR).abs(), (second * cos_TR).abs() + (first * sin_TR).abs()
    return exact, torch.cat((*sizes, rest.abs()), dim=2)


@pytest.mark.parametrize("width", hadamard.WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 33] if IS_INTERPRETED else [1, 33, 1000])
def test_hadamard_is_a_sum_and_undoes_itself(num_tokens, dtype, width):
    x = rows(num_tokens, 3 * width, dtype)
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < width:
        h = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), h)
    h = h.to(DEVICE) / math.sqrt(width)
    pieces = x.double().unflatten(1, (3, width))
    got = hadamard_kernel.launch(x, width).unflatten(1, (3, width))
    exact = pieces @ h
    sums = pieces.abs().sum(dim=2, keepdim=True) / math.sqrt(width)
    eps = torch.finfo(dtype).eps / 2
    assert ((got.double() - exact).abs() <= eps * 1.01 * exact.abs() + width * 2.0**-23 * sums + 1e-7).all()
    back = hadamard_kernel.launch(got.flatten(1), width).unflatten(1, (3, width))
    bound = eps * 1.01 * (pieces.abs() + got.double().abs().sum(dim=2, keepdim=True) / math.sqrt(width))
    assert ((back.double() - pieces).abs() <= bound + width * 2.0**-22 * sums + 1e-6).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES[:-1])
@pytest.mark.parametrize(
    ("num_features", "groups"), [(64, 2), (129, 1)] + [(4096, 32)] * (not IS_INTERPRETED)
)
def test_packed_rows_are_the_tables(num_features, groups, dtype, bits):
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (50, num_features), generator=generator(0))
    per_word = 32 // bits
    padded = torch.nn.functional.pad(codes, (0, -num_features % per_word), value=-(2 ** (bits - 1)))
    words = (padded + 2 ** (bits - 1)).unflatten(1, (-1, per_word)) << torch.arange(0, 32, bits)
    packed = words.sum(dim=2).to(torch.int32).to(DEVICE)
    scale = (0.01 + torch.rand(50, groups, generator=generator(1))).to(dtype)
    ids = torch.tensor([0, 49, 7, 7, 31])
    for multiplier in (1.0, 59.5):
        dense = (codes.to(dtype).unflatten(1, (groups, -1)) * scale[:, :, None]).flatten(1) * multiplier
        got = embedding_kernel.launch(
            ids.to(DEVICE), packed, scale.to(DEVICE), num_features, bits, multiplier
        )
        assert torch.equal(got.cpu(), dense[ids])
        on_cpu = embedding.embed(ids, packed.cpu(), scale, num_features, bits, multiplier)
        assert torch.equal(on_cpu, dense[ids])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_rows", "num_logits"),
    [(1, 5), (3, 900 if IS_INTERPRETED else 5000)] + [(65, 128256)] * (not IS_INTERPRETED),
)
def test_largest_logits_in_order(num_rows, num_logits, dtype):
    logits = torch.randn(num_rows, num_logits, generator=generator(0)).to(dtype)  # 16 bits: many ties
    logits[0, 3], logits[0, 1] = torch.inf, torch.inf
    logits[-1, 2:] = -torch.inf
    values, order = logits.float().sort(dim=1, descending=True, stable=True)
    whole = torch.full((num_rows, num_logits + 3), torch.nan, dtype=dtype, device=DEVICE)
    whole[:, :num_logits] = logits.to(DEVICE)
    tokens, is_nan = sampling_kernel.launch_argmax(whole[:, :num_logits])
    assert torch.equal(tokens.cpu(), order[:, 0])
    assert not is_nan.any()
    for num_kept in (1, 5) if num_logits < 128 else (1, 50) if IS_INTERPRETED else (1, 20, 64, 128):
        got = sampling_kernel.launch_topk(whole[:, :num_logits], num_kept)
        assert torch.equal(got[0].cpu(), values[:, :num_kept])
        assert torch.equal(got[1].cpu(), order[:, :num_kept])
    logits[0, 4] = torch.nan
    tokens, is_nan = sampling_kernel.launch_argmax(logits.to(DEVICE))
    assert tokens[0] == 4
    assert is_nan.tolist() == [True] + [False] * (num_rows - 1)


@needs_gpu
def test_past_two_to_the_31_elements():
    num_tokens = (1 << 31) // 16384 + 3
    x = torch.zeros(num_tokens, 16384, dtype=torch.bfloat16, device=DEVICE)
    x[-1] = rows(1, 16384, torch.bfloat16)[0]
    weight = torch.ones(16384, dtype=torch.bfloat16, device=DEVICE)
    for work in (
        lambda x: row_codes_kernel.launch(x, Codes(torch.int8, 0))[0],
        lambda x: norm_kernel.launch_codes(x, None, Norm(weight, 1e-6), Codes(torch.int8, 0, None, None))[0],
        lambda x: silu_kernel.launch_codes(x, "silu", Codes(torch.int8, 0, None))[0],
        lambda x: hadamard_kernel.launch(x, 128),
    ):
        assert torch.equal(work(x)[-1:], work(x[-1:]))


@needs_gpu
def test_repeated_runs_and_operators():
    x, weight = rows(8191, 4096, torch.bfloat16), torch.ones(4096, dtype=torch.bfloat16, device=DEVICE)
    first = norm_kernel.launch_codes(x, None, Norm(weight, 1e-6), Codes(torch.int8, 0, None, None))
    for _ in range(20):
        assert same(
            first, norm_kernel.launch_codes(x, None, Norm(weight, 1e-6), Codes(torch.int8, 0, None, None))
        )
    one = norm_kernel.launch_codes(x[77:78], None, Norm(weight, 1e-6), Codes(torch.int8, 0, None, None))
    assert same(one, [tensor[77:78] for tensor in first])  # alone as in a batch
    checks = {"test_utils": ("test_schema", "test_faketensor")}
    for op, arguments in (
        (norm_quant.rms_norm, (x, x.clone(), weight, 1e-6, False, None)),
        (norm_quant.rms_norm_codes, (x, None, weight, 1e-6, False, None, torch.int8, 0, None, None)),
        (silu_quant.gated_activation, (x, "silu")),
        (silu_quant.gated_activation_codes, (x, "silu", torch.int8, 0, None, None)),
        (row_codes.quantize_rows, (x, torch.int8, 0, None, None)),
        (hadamard.hadamard, (x, 128)),
        (sampling.argmax, (x,)),
        (sampling.topk, (x, 5)),
    ):
        torch.library.opcheck(op, arguments, **checks)
