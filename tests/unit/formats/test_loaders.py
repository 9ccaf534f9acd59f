"""Verdicts on loaders: each fact applies where it should, says how it is known, and stops nothing else."""

import pytest

from quantkit.formats.loaders import LinearFacts, loader_verdicts
from quantkit.schemes import FloatSpec, IntSpec, PerChannel, PerToken, Scheme
from tests.product_schemes import KV_SCHEMES, SCHEMES

W4, W4_ASYM, W8 = SCHEMES["int4-g128-sym"], SCHEMES["int4-g128-asym"], SCHEMES["int8-channel-sym"]
W8A8, FP8, FP8_TENSOR = (
    SCHEMES["int8-w8a8-dynamic"],
    SCHEMES["fp8-channel-token"],
    SCHEMES["fp8-tensor-static"],
)


def linear(scheme, name="mlp.down_proj", *, group=None, shape=(512, 1024), is_expert=False):
    return LinearFacts(name, group or name, scheme, shape, is_expert)


def answers(*linears, kv=None, unmatched=()):
    verdicts = loader_verdicts(linears, None if kv is None else KV_SCHEMES[kv], unmatched=unmatched)
    return tuple(verdict.loads for verdict in verdicts)


def reasons(loader, *linears, kv=None, unmatched=()):
    verdicts = loader_verdicts(linears, None if kv is None else KV_SCHEMES[kv], unmatched=unmatched)
    (verdict,) = (one for one in verdicts if one.loader == loader)
    return " | ".join(f"{reason.text} [{reason.evidence}]" for reason in verdict.reasons)


@pytest.mark.parametrize(
    "name, expected",
    [  # transformers, vLLM, SGLang
        ("int4-g128-sym", ("yes", "yes", "yes")),
        ("int4-g32-sym", ("yes", "yes", "yes")),
        ("int4-g128-asym", ("no", "yes", "yes")),
        ("int8-channel-sym", ("yes", "yes", "yes")),
        ("int2-g128-sym", ("yes", "yes", "no")),
        ("int8-w8a8-dynamic", ("yes", "yes", "yes")),
        ("int8-w8a8-static-asym", ("yes", "yes", "unknown")),
        ("fp8-channel-token", ("yes", "yes", "yes")),
        ("fp8-tensor-static", ("yes", "yes", "yes")),
        ("fp8-block", ("yes", "yes", "yes")),
        ("fp8-channel-weight", ("yes", "yes", "yes")),
        ("w4a8-int8-g128", ("yes", "unknown", "no")),
        ("w4a8-fp8-g128", ("yes", "yes", "no")),
        ("w4a8-fp8-g64", ("yes", "no", "no")),
    ],
)
def test_one_scheme(name, expected):
    assert answers(linear(SCHEMES[name])) == expected


@pytest.mark.parametrize(
    "name, expected",
    [
        ("int4-g128-sym", ("yes", "yes", "yes")),
        ("int4-g128-asym", ("no", "unknown", "unknown")),
        ("int8-w8a8-dynamic", ("no", "unknown", "no")),
        ("fp8-channel-token", ("yes", "unknown", "yes")),
        ("fp8-channel-weight", ("yes", "unknown", "no")),
        ("w4a8-fp8-g128", ("yes", "unknown", "yes")),
    ],
)
def test_experts(name, expected):
    assert answers(linear(SCHEMES[name], is_expert=True)) == expected


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("is_expert", [False, True])
def test_every_scheme_has_a_verdict_with_evidence_from_every_loader(name, is_expert):
    for verdict in loader_verdicts([linear(SCHEMES[name], is_expert=is_expert)], None):
        assert verdict.reasons
        for reason in verdict.reasons:
            assert reason.text and (reason.answer == "unknown" or reason.evidence != "not confirmed")


def test_one_linear_that_does_not_load_stops_the_checkpoint():
    assert answers(linear(W4), linear(W4_ASYM, "mlp.up_proj"))[0] == "no"


def test_nothing_quantized_loads_everywhere():
    assert answers(linear(None)) == ("yes", "yes", "yes")


def test_fused_linears_have_to_share_a_scheme():
    q, k = (linear(scheme, name, group="qkv_proj") for scheme, name in ((W4, "q_proj"), (W8, "k_proj")))
    assert answers(q, k) == ("yes", "no", "no")
    assert "qkv_proj is one matmul but has INT4 group 128 and INT8 channel" in reasons("vLLM", q, k)
    assert answers(q, linear(None, "k_proj", group="qkv_proj")) == ("yes", "no", "no")
    assert answers(q, linear(W4, "k_proj", group="qkv_proj")) == ("yes", "yes", "yes")


def test_several_schemes_are_warned_of_in_transformers_only():
    both = (linear(W4), linear(FP8, "self_attn.o_proj"))
    assert answers(*both) == ("yes", "yes", "yes")
    assert "dequantize=True" in reasons("transformers", *both)
    assert "dequantize=True" not in reasons("transformers", linear(W4))


def test_a_linear_that_nothing_names_stops_serving():
    assert answers(linear(W4), linear(None, "x"), unmatched=["x"]) == ("yes", "no", "no")


def test_blocks_have_to_be_whole():
    odd = linear(SCHEMES["fp8-block"], shape=(512, 576))
    assert answers(odd) == ("no", "unknown", "unknown")
    assert "in_features 576" in reasons("transformers", odd)


def test_odd_shapes_of_packed_weights_are_not_promised():
    assert answers(linear(SCHEMES["int4-g64-sym"], shape=(1536, 576))) == ("yes", "unknown", "unknown")


def test_one_scale_per_fused_linear_is_mentioned():
    assert "requantized" in reasons("vLLM", linear(FP8_TENSOR, "q_proj", group="qkv_proj"))
    assert "requantized" not in reasons("vLLM", linear(FP8_TENSOR))


@pytest.mark.parametrize(
    "kv, loader, said",
    [
        ("kv-fp8-tensor", "vLLM", "--kv-cache-dtype auto"),
        ("kv-fp8-tensor", "SGLang", "--kv-cache-dtype auto"),
        ("kv-fp8-head", "vLLM", "--kv-cache-dtype auto"),
        ("kv-fp8-head", "SGLang", "one scale per tensor only"),
        ("kv-int8-token", "vLLM", "--kv-cache-dtype int8_per_token_head"),
        ("kv-int8-head", "vLLM", "the cache stays in 16 bits"),
        ("kv-int8-head", "SGLang", "--kv-cache-dtype fp8_e4m3"),
        ("kv-int8-head", "transformers", "the cache stays in 16 bits"),
    ],
)
def test_caches_never_stop_a_load_but_are_explained(kv, loader, said):
    assert answers(linear(W8A8), kv=kv) == ("yes", "yes", "yes")
    assert said in reasons(loader, linear(W8A8), kv=kv)


def test_experts_keep_their_inputs_in_transformers():
    scheme = Scheme(
        weight=IntSpec(bits=8, granularity=PerChannel()), activation=IntSpec(bits=8, granularity=PerToken())
    )
    assert "their inputs stay in 16 bits" in reasons("transformers", linear(scheme, is_expert=True))
    static = Scheme(weight=FloatSpec(granularity=PerChannel()), activation=FloatSpec(granularity=PerToken()))
    assert "their inputs stay" not in reasons("transformers", linear(static))


@pytest.mark.parametrize(
    ("kv", "loader", "said"),
    [
        ("kv-fp8-tensor", "vLLM", "closest is --kv-cache-dtype fp8_e4m3 --kv-cache-dtype-skip-layers 0 5"),
        ("kv-int8-head", "vLLM", "--kv-cache-dtype-skip-layers 0 5"),
        ("kv-fp8-tensor", "SGLang", "its config cannot say it, so the cache stays in 16 bits"),
        ("kv-fp8-tensor", "transformers", "not read; the cache stays in 16 bits"),
    ],
)
def test_layers_that_stay_are_named_with_the_flags_that_come_closest(kv, loader, said):
    verdicts = loader_verdicts([linear(W4)], KV_SCHEMES[kv], kept_layers=[0, 5])
    (verdict,) = (one for one in verdicts if one.loader == loader)
    text = " | ".join(reason.text for reason in verdict.reasons)
    assert verdict.loads == "yes" and said in text and "16 bits in layers 0, 5" in text


@pytest.mark.parametrize(
    "name, expected", [(None, "no"), ("int4-g128-sym", "no"), ("fp8-channel-token", "yes")]
)
def test_transformers_decodes_experts_that_stay_too(name, expected):
    dense = linear(None if name is None else SCHEMES[name], "self_attn.o_proj")
    assert answers(dense, linear(None, "mlp.experts.0.down_proj", is_expert=True))[0] == expected
