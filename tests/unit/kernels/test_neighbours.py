"""What stands between the products, on a CPU: the operators are the definitions, and the GPU's kernels compile."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers.activations import ACT2FN
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, rotate_half

from quantkit.numerics.hadamard import orthogonal_factors
from quantkit.numerics.kv_codes import LARGEST, encode_kv
from quantkit.numerics.packing import pack
from quantkit.schemes import FloatSpec, IntSpec, PerGroup, PerTensor, PerToken, QParams
from quantkit.schemes.activation import dynamic_scale, input_qparams, to_codes
from quantkit_kernels.embedding import embed_packed
from quantkit_kernels.hadamard import hadamard
from quantkit_kernels.norm_quant import rms_norm, rms_norm_codes
from quantkit_kernels.rope_append import rope_append
from quantkit_kernels.row_codes import quantize_rows
from quantkit_kernels.sampling import argmax, topk
from quantkit_kernels.silu_quant import gated_activation, gated_activation_codes

ROOT = Path(__file__).parents[3]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CODES = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}
ACTIVATIONS = {"silu": ACT2FN["silu"], "gelu_tanh": ACT2FN["gelu_pytorch_tanh"]}


def random(*shape, dtype=torch.bfloat16, seed=0):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return (x * torch.logspace(-2, 1, shape[-1])).to(dtype)


def norm_of_transformers(weight, *, plus_one):
    """Gemma's norm, or that of all others, with eps 1e-6."""
    norm = (Gemma3RMSNorm if plus_one else LlamaRMSNorm)(len(weight), eps=1e-6)
    norm.weight = torch.nn.Parameter(weight, requires_grad=False)
    return norm


def spec_of(code_dtype, granularity, *, symmetric=True):
    if code_dtype == torch.float8_e4m3fn:
        return FloatSpec(granularity=granularity)
    return IntSpec(bits=8, granularity=granularity, symmetric=symmetric)


def assert_codes(got, x_TK, spec, static=None):
    """Codes and scales are those of `schemes.activation`."""
    codes, scale = got
    if isinstance(spec.granularity, PerGroup):
        x_TK = x_TK.reshape(len(x_TK), -1, spec.granularity.size)
        qparams = QParams(dynamic_scale(x_TK, spec))
    else:
        qparams = input_qparams(x_TK, spec, static)
    assert torch.equal(codes.to(x_TK.dtype), to_codes(x_TK, spec, qparams).flatten(1))
    assert torch.equal(
        scale, qparams.scale.float().reshape(-1, 1 if static else scale.shape[1]).expand_as(scale)
    )


@pytest.mark.parametrize("code_dtype", CODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_are_those_of_the_schemes(dtype, code_dtype):
    x_TK = random(7, 256, dtype=dtype)
    x_TK[3] = 0
    for granularity, group in ((PerToken(), 0), (PerGroup(64), 64)):
        got = quantize_rows(x_TK, code_dtype, group, None, None)
        assert_codes(got, x_TK, spec_of(code_dtype, granularity))
    scale, zero_point = torch.tensor([0.0123]), torch.tensor([5], dtype=torch.int8)
    spec = spec_of(code_dtype, PerTensor())
    assert_codes(quantize_rows(x_TK, code_dtype, 0, scale, None), x_TK, spec, QParams(scale))
    if code_dtype == torch.int8:
        spec = spec_of(code_dtype, PerTensor(), symmetric=False)
        got = quantize_rows(x_TK, code_dtype, 0, scale, zero_point)
        assert_codes(got, x_TK, spec, QParams(scale, zero_point))


@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_are_those_of_transformers(dtype, plus_one):
    x, before, weight = (
        random(7, 96, dtype=dtype),
        random(7, 96, dtype=dtype, seed=1),
        random(96, dtype=dtype, seed=2),
    )
    norm = norm_of_transformers(weight, plus_one=plus_one)
    assert torch.equal(rms_norm(x, None, weight, 1e-6, plus_one, None), norm(x))
    residual = before.clone()
    expected = norm(before + x)
    assert torch.equal(rms_norm(x, residual, weight, 1e-6, plus_one, None), expected)
    assert torch.equal(residual, before + x)
    inner = norm_of_transformers(random(96, dtype=dtype, seed=3), plus_one=plus_one)
    twice = rms_norm(x, before.clone(), weight, 1e-6, plus_one, inner.weight)
    assert torch.equal(twice, norm(before + inner(x)))
    for code_dtype in CODES:
        residual = before.clone()
        got = rms_norm_codes(x, residual, weight, 1e-6, plus_one, None, code_dtype, 0, None, None)
        assert_codes(got, expected, spec_of(code_dtype, PerToken()))
        assert torch.equal(residual, before + x)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_are_those_of_transformers(dtype, activation):
    gate, up = random(7, 96, dtype=dtype), random(7, 96, dtype=dtype, seed=1)
    expected = ACTIVATIONS[activation](gate) * up
    gate_up = torch.cat((gate, up), dim=1)
    assert torch.equal(gated_activation(gate_up, activation), expected)
    got = gated_activation_codes(gate_up, activation, torch.int8, 32, None, None)
    assert_codes(got, expected, spec_of(torch.int8, PerGroup(32)))


@pytest.mark.parametrize("rotated", [16, 12, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_are_rotated_and_keys_and_values_stored(dtype, rotated):
    tokens, queries, heads, dim = 6, 4, 2, 16
    qkv = random(tokens, (queries + 2 * heads) * dim, dtype=dtype)
    positions, slots = torch.tensor([0, 1, 2, 9, 9, 3]), torch.tensor([33, 7, -1, 16, 0, 47])
    angles = torch.arange(10)[:, None] / 100 ** (torch.arange(rotated // 2) / rotated)
    cos, sin = angles.cos(), angles.sin()
    weights = [random(dim, dtype=dtype, seed=seed) for seed in (1, 2)]
    shape = (3, heads, 16, dim)
    pages = [torch.full(shape, torch.nan, dtype=dtype) for _ in range(2)]
    q = rope_append(qkv, positions, cos, sin, slots, *weights, 1e-6, True, *pages, None, None)

    parts = qkv.reshape(tokens, -1, dim).split((queries, heads, heads), dim=1)
    turned = []
    for part, weight in zip(parts, weights, strict=False):
        x = norm_of_transformers(weight, plus_one=True)(part).float()
        wide_cos, wide_sin = (torch.cat((table[positions],) * 2, dim=1)[:, None] for table in (cos, sin))
        first, rest = x[..., :rotated], x[..., rotated:]
        turned.append(torch.cat((first * wide_cos + rotate_half(first) * wide_sin, rest), dim=2).to(dtype))
    assert torch.equal(q, turned[0])
    kept = slots >= 0
    block, slot = slots[kept] // 16, slots[kept] % 16
    for page, expected in zip(pages, (turned[1], parts[2]), strict=True):
        assert torch.equal(page[block, :, slot], expected[kept])
        assert page.isnan().sum() == page.numel() - expected[kept].numel()

    for code_dtype, name in CODES.items():
        coded = [torch.zeros(shape, dtype=torch.int8).view(code_dtype) for _ in range(2)]
        scales = [torch.rand(heads) for _ in range(2)]
        rope_append(qkv, positions, cos, sin, slots, *weights, 1e-6, True, *coded, *scales)
        for codes, scale, expected in zip(coded, scales, (turned[1], parts[2]), strict=True):
            stored = codes.view(torch.int8)[block, :, slot].view(code_dtype)
            assert same(stored, encode_kv(expected[kept], name, scale.to(dtype)[None, :, None]))
        scales = [torch.zeros(shape[:3]) for _ in range(2)]
        rope_append(qkv, positions, cos, sin, slots, *weights, 1e-6, True, *coded, *scales)
        for codes, scale, expected in zip(coded, scales, (turned[1], parts[2]), strict=True):
            step = expected[kept].abs().amax(dim=2, keepdim=True) / LARGEST[name]
            stored = codes.view(torch.int8)[block, :, slot].view(code_dtype)
            assert same(stored, encode_kv(expected[kept], name, step))
            assert torch.equal(scale[block, :, slot], step[..., 0].float())


def same(a, b):
    return torch.equal(a.view(torch.int8), b.view(torch.int8))


@pytest.mark.parametrize("width", [16, 32, 64, 128])
def test_hadamard_is_sylvesters_matrix(width):
    x = random(5, 3 * width, dtype=torch.float32)
    (factor,) = orthogonal_factors(width, torch.Generator())
    expected = x.double().reshape(5, 3, width) @ factor
    got = hadamard(x, width).reshape(5, 3, width)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_rows_are_those_on_disk(bits):
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (9, 64)).to(torch.int8)
    scale = random(9, 2)
    dense = (codes.bfloat16().reshape(9, 2, 32) * scale[:, :, None]).flatten(1)
    ids = torch.tensor([8, 0, 0, 5])
    assert torch.equal(embed_packed(ids, pack(codes, bits), scale, 64, bits, 1.0), dense[ids])


def test_equal_logits_go_to_the_lowest_index():
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, -torch.inf, -0.0, 0.0]])
    assert argmax(logits)[0].tolist() == [1, 0]
    values, tokens = topk(logits, 3)
    assert tokens.tolist() == [[1, 2, 3], [0, 2, 3]]
    assert values.tolist() == [[3, 3, 2], [0, 0, 0]]


def test_what_a_kernel_could_not_read_is_refused():
    x, weight = random(4, 32), random(32)
    table = torch.zeros(4, 1, dtype=torch.int32), torch.ones(4, 1)
    for message, call in (
        ("contiguous features", lambda: rms_norm(x.T, None, weight, 1e-6, False, None)),
        ("weight of torch.float32", lambda: rms_norm(x, None, weight.float(), 1e-6, False, None)),
        ("residual", lambda: rms_norm(x, x[:2].clone(), weight, 1e-6, False, None)),
        ("32 by 24", lambda: quantize_rows(x, torch.int8, 24, None, None)),
        ("codes of torch.uint8", lambda: quantize_rows(x, torch.uint8, 0, None, None)),
        ("zero point", lambda: quantize_rows(x, torch.int8, 0, None, torch.zeros(1, dtype=torch.int8))),
        ("activation 'relu'", lambda: gated_activation(x, "relu")),
        ("pieces of 24", lambda: hadamard(x, 24)),
        ("x of torch.int32", lambda: hadamard(x.int(), 32)),
        ("x of torch.float64", lambda: quantize_rows(x.double(), torch.int8, 0, None, None)),
        ("x of torch.int32", lambda: quantize_rows(x.int(), torch.int8, 0, None, None)),
        ("ids of torch.float32", lambda: embed_packed(torch.ones(1), *table, 8, 4, 1.0)),
        ("ids from -1 on", lambda: embed_packed(torch.tensor([2, -1]), *table, 8, 4, 1.0)),
        ("33 of 32", lambda: topk(x, 33)),
    ):
        with pytest.raises(AssertionError, match=message):
            call()


def test_operators_need_no_triton():
    code = "import sys; sys.modules['triton'] = None\n" + "\n".join(
        f"import quantkit_kernels.{name}"
        for name in (
            "draw",
            "embedding",
            "gptq_block",
            "hadamard",
            "moe",
            "moments",
            "norm_quant",
            "paged_attention",
            "paged_operators",
            "product",
            "rope_append",
            "row_codes",
            "sampling",
            "scale_search",
            "silu_quant",
        )
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_operators_say_what_they_return_and_write():
    x, weight, logits = random(4, 64), random(64), random(4, 64, dtype=torch.float32)
    pages = [torch.zeros(2, 1, 16, 16, dtype=torch.int8) for _ in range(2)]
    tables = (torch.arange(4), torch.ones(8, 4), torch.zeros(8, 4), torch.arange(4))
    for op, arguments in (
        (quantize_rows, (x, torch.int8, 32, None, None)),
        (rms_norm, (x, x.clone(), weight, 1e-6, False, None)),
        (rms_norm_codes, (x, x.clone(), weight, 1e-6, False, None, torch.int8, 0, None, None)),
        (gated_activation, (x, "silu")),
        (gated_activation_codes, (x, "silu", torch.int8, 0, None, None)),
        (rope_append, (x, *tables, None, None, 1e-6, False, *pages, torch.ones(1), torch.ones(1))),
        (hadamard, (x, 32)),
        (embed_packed, (torch.arange(3), torch.zeros(4, 8, dtype=torch.int32), random(4, 2), 64, 4, 1.0)),
        (argmax, (logits,)),
        (topk, (logits, 5)),
    ):
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
