"""Experts: the two ways to run them against each other and against their definition; what no kernel takes."""

import pytest
import torch

from quantkit.errors import SchemeError
from quantkit.runtime.layers import build_experts as build_experts_module
from quantkit.runtime.layers import gpu_linear
from quantkit.runtime.layers.build_experts import build_experts, check_experts, group_experts
from quantkit.runtime.layers.linear import Linear
from quantkit.runtime.layers.linear_part import LinearPart, quantized_part
from quantkit.runtime.layers.moe import ExpertByExpert, SparseMLP
from quantkit.runtime.target import Target
from quantkit.schemes import FloatSpec, IntSpec, PerChannel, PerGroup, PerTensor, PerToken, Scheme
from quantkit.schemes.activation import fake_quantize_input
from quantkit.schemes.labels import scheme_label
from quantkit.schemes.tiles import dequantize_weight
from tests.product_schemes import SCHEMES
from tests.tiny_models import round_to_nearest

HIDDEN, INNER, NUM, CHOSEN = 128, 256, 6, 2
CPU = torch.device("cpu")
TOKENS = FloatSpec(granularity=PerToken())
GROUPED = {
    "16 bits": None,
    "int4 group": Scheme(weight=IntSpec(bits=4, granularity=PerGroup(64))),
    "int4 group asymmetric": Scheme(weight=IntSpec(bits=4, granularity=PerGroup(32), symmetric=False)),
    "int4 channel": Scheme(weight=IntSpec(bits=4, granularity=PerChannel())),
    "fp8 tensor": Scheme(weight=FloatSpec(granularity=PerTensor())),
    "fp8 channel": Scheme(weight=FloatSpec(granularity=PerChannel()), activation=TOKENS),
    "fp8 block": SCHEMES["fp8-block"],
}


def random_experts(scheme, dtype):
    """(gate and up, down) of every expert as they are stored, and the values of gate, up and down, float64."""
    random = torch.Generator().manual_seed(1)
    parts, values = [], []
    for _ in range(NUM):
        shapes = {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
        weights = {name: torch.randn(shape, generator=random) * 0.1 for name, shape in shapes.items()}
        if scheme is None:
            linears = [LinearPart(name, w.to(dtype)) for name, w in weights.items()]
            values.append([part.weight.double() for part in linears])
        else:
            stored = {name: round_to_nearest(w, scheme) for name, w in weights.items()}
            linears = [quantized_part(name, linear, scheme, None) for name, linear in stored.items()]
            granularity = scheme.weight.granularity
            values.append(
                [
                    dequantize_weight(linear.codes_NK, granularity, linear.qparams).double()
                    for linear in stored.values()
                ]
            )
        parts.append((linears[:2], linears[2]))
    return parts, values


def with_fp8(monkeypatch, has_fp8=True):
    """As a GPU with FP8 instructions, or one without."""
    for module in (gpu_linear, build_experts_module):
        monkeypatch.setattr(module, "converts_float8", lambda device: has_fp8)


def build(how, scheme, dtype, parts):
    pairs, lasts = ([part[which] for part in parts] for which in (0, 1))
    return how(pairs, lasts, NUM, scheme, "silu", Target(CPU, dtype))


def routed(num_tokens):
    random = torch.Generator().manual_seed(2)
    weight, expert = torch.rand(num_tokens, NUM, generator=random).topk(CHOSEN, dim=1)
    return torch.randn(num_tokens, HIDDEN, generator=random).bfloat16(), expert, weight


def definition(x, expert_TS, weight_TS, values, spec):
    """Token by token in float64, inputs quantized as `spec` says."""

    def seen(rows):
        return (rows if spec is None else fake_quantize_input(rows, spec, None)).double()

    out = torch.zeros(len(x), HIDDEN, dtype=torch.float64)
    for token in range(len(x)):
        for expert, weight in zip(expert_TS[token].tolist(), weight_TS[token].tolist(), strict=True):
            gate, up, down = values[expert]
            row = seen(x[token : token + 1])
            inner = torch.nn.functional.silu((row @ gate.T).bfloat16()) * (row @ up.T).bfloat16()
            out[token] += weight * (seen(inner) @ down.T)[0]
    return out


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("how", [build_experts, group_experts])
def test_experts_are_their_definition(how, name, monkeypatch):
    with_fp8(monkeypatch)
    scheme = GROUPED[name]
    parts, values = random_experts(scheme, torch.bfloat16)
    experts = build(how, scheme, torch.bfloat16, parts)
    for num_tokens in (1, 40):
        x, expert, weight = routed(num_tokens)
        expected = definition(x, expert, weight, values, scheme and scheme.activation)
        y = experts(x, expert, weight)
        assert y.dtype == torch.bfloat16
        # 16-bit roundings of gate, up, their product and the result; a code of the inner rows may be the next one
        bound = 0.05 if scheme is not None and scheme.activation is not None else 0.01
        assert float((y.double() - expected).norm() / expected.norm()) < bound


def test_weights_are_float32_and_may_be_normalized():
    router = Linear(torch.randn(NUM, HIDDEN))
    seen = {}

    class Spy(ExpertByExpert):
        def __call__(self, x_TE, expert_TS, weight_TS):
            seen["expert"], seen["weight"] = expert_TS, weight_TS
            return x_TE

    x = torch.randn(9, HIDDEN)
    probability = torch.softmax(router(x), dim=1)
    for is_normalized in (True, False):
        SparseMLP(router, Spy([]), num_per_token=CHOSEN, is_normalized=is_normalized)(x)
        assert seen["weight"].dtype == torch.float32
        chosen = probability.gather(1, seen["expert"])
        assert torch.equal(chosen.sort(dim=1).values, probability.sort(dim=1).values[:, -CHOSEN:])
        total = chosen.sum(dim=1, keepdim=True) if is_normalized else 1
        torch.testing.assert_close(seen["weight"], chosen / total)


def test_one_after_another_runs_only_those_that_a_token_goes_to():
    ran = []

    class Counted(torch.nn.Module):
        def __init__(self, number):
            super().__init__()
            self.number = number

        def forward(self, x):
            ran.append((self.number, len(x)))
            return x

    experts = ExpertByExpert(Counted(number) for number in range(NUM))
    x = torch.randn(3, HIDDEN)
    expert = torch.tensor([[4, 1], [1, 2], [4, 1]])
    y = experts(x, expert, torch.full((3, 2), 0.5))
    assert ran == [(1, 3), (2, 1), (4, 2)]
    torch.testing.assert_close(y, x)


REFUSED = {
    "int8-w8a8-dynamic": "FP8, with 16-bit inputs",
    "int8-channel-sym": "FP8, with 16-bit inputs",
    "fp8-tensor-static": "FP8 ones with dynamic scales",
    "w4a8-fp8-g64": "INT4 in groups of 32, 64 or 128 with 16-bit inputs",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_scheme_without_a_kernel_is_named_with_what_comes_nearest(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    with_fp8(monkeypatch)
    with pytest.raises(SchemeError) as caught:
        check_experts("layers.0.mlp.experts.0.up_proj", SCHEMES[name], Target(CPU, torch.bfloat16))
    problem = f"layers.0.mlp.experts.0.up_proj in {scheme_label(SCHEMES[name])} on Some GPU"
    assert caught.value.problem.startswith(problem)
    assert REFUSED[name] in caught.value.fix


def test_fp8_experts_need_a_gpu_with_fp8(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    with_fp8(monkeypatch, has_fp8=False)
    target = Target(CPU, torch.bfloat16)
    check_experts("gate", GROUPED["int4 group"], target)
    with pytest.raises(SchemeError, match="gate in FP8 tensor on Some GPU") as caught:
        check_experts("gate", GROUPED["fp8 tensor"], target)
    assert "INT4" in caught.value.fix


def test_experts_of_one_layer_have_one_format():
    scheme = GROUPED["int4 group"]
    parts, _ = random_experts(scheme, torch.bfloat16)
    others, _ = random_experts(GROUPED["int4 channel"], torch.bfloat16)
    parts[3] = others[3]
    with pytest.raises(
        SchemeError, match="gate, up is in another format than the rest of its layer's experts"
    ):
        build(group_experts, scheme, torch.bfloat16, parts)
