"""config.json as published: what the runtime makes of it, and that transformers makes the same of it."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from quantkit.errors import SourceError, UnsupportedModelError
from quantkit.formats.checkpoint import Checkpoint
from quantkit.runtime.layers.rotary import DefaultRope, LongRope, NoRope, frequencies
from quantkit.runtime.load import load_model
from quantkit.runtime.models.families import read_spec
from quantkit.runtime.models.spec import Norms
from tests import published_configs as published
from tests.tiny_models import tokens

TINY = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
TINY |= {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LONG = {"long_factor": [1.1, 1.5, 2.5, 4.0, 8.0, 16.0, 20.0, 32.0], "type": "longrope"}
LONG |= {"short_factor": [1.0, 1.05, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6]}
ORIGINAL = {
    "original_max_position_embeddings": 16
}  # so that transformers takes the long factors, as the runtime does
SMALL = {  # published key by key, but for sizes that take long
    "gemma2": (published.GEMMA2_27B, {"num_hidden_layers": 3, "head_dim": 32, "sliding_window": 6}),
    "phi3-4k": (published.PHI3_MINI_4K, {"num_hidden_layers": 2, "sliding_window": 7}),
    "phi3-128k": (published.PHI3_MINI_128K, {"num_hidden_layers": 2, "rope_scaling": LONG, **ORIGINAL}),
    "phi3-128k-short": (
        published.PHI3_MINI_128K,
        {"num_hidden_layers": 2, "rope_scaling": LONG, "original_max_position_embeddings": 131072},
    ),
    "phi4": (published.PHI4, {"num_hidden_layers": 2}),
    "phi4-mini": (
        published.PHI4_MINI,
        {
            **ORIGINAL,
            "num_hidden_layers": 2,
            "rope_scaling": {key: value if key == "type" else value[:6] for key, value in LONG.items()},
        },
    ),
    "olmo2": (published.OLMO2_7B, {"num_hidden_layers": 2}),
    "smollm3": (
        published.SMOLLM3_3B,
        {"num_hidden_layers": 5, "no_rope_layers": [1, 1, 1, 0, 1], "layer_types": ["full_attention"] * 5},
    ),
    "mixtral": (published.MIXTRAL_8X7B, {"num_hidden_layers": 2, "num_local_experts": 4}),
    "qwen2-moe": (
        published.QWEN15_MOE,
        {
            "num_hidden_layers": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
            "num_experts": 12,
        },
    ),
    "qwen3-moe": (
        published.QWEN3_30B_A3B,
        {
            "num_hidden_layers": 2,
            "head_dim": 32,
            "moe_intermediate_size": 32,
            "num_experts": 12,
            "num_experts_per_tok": 3,
        },
    ),
    "olmoe": (published.OLMOE_1B_7B, {"num_hidden_layers": 2, "num_experts": 12, "num_experts_per_tok": 3}),
}


def spec_of(config, **changes):
    """Of a config alone; only its number of layers is compared with tensors, of which there are enough."""
    return read_spec(Checkpoint(Path("folder"), {**config, **changes}, dict.fromkeys(range(1000))))


@pytest.mark.parametrize("name", SMALL)
def test_logits_equal_those_of_transformers_with_the_same_config(name, tmp_path):
    config, changes = SMALL[name]
    config = {**config, **TINY, **changes}
    settings = {key: value for key, value in config.items() if key not in ("model_type", "torch_dtype")}
    torch.manual_seed(sum(name.encode()))
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(config["model_type"], **json.loads(json.dumps(settings)))
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 0.5)
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    ids = tokens(41)
    with torch.no_grad():
        expected = model(input_ids=ids[None]).logits[0]
    ours = load_model(tmp_path, dtype=torch.float32).logits(ids)
    assert float((ours - expected).norm() / expected.norm()) < 1e-5


def test_gemma2():
    spec = spec_of(published.GEMMA2_27B)
    assert [layer.window for layer in spec.layers] == [4096, None] * 23
    assert spec.attention_scale == 144**-0.5
    assert (spec.attention_softcap, spec.logit_softcap) == (50.0, 30.0)
    assert spec.norms is Norms.AROUND
    assert spec.is_head_tied


def test_phi():
    spec = spec_of(published.PHI3_MINI_4K)
    assert spec.layers == (spec.layers[0],) * 32
    assert (spec.layers[0].window, spec.head_dim, spec.rotary_dim) == (2047, 96, 96)
    assert spec.has_fused_projections
    spec = spec_of(published.PHI4)
    assert (spec.layers[0].window, spec.layers[0].rope) == (None, DefaultRope(theta=250000))
    spec = spec_of(published.PHI4_MINI)
    rope = spec.layers[0].rope
    assert isinstance(rope, LongRope)
    assert (spec.head_dim, spec.rotary_dim, len(rope.short)) == (128, 96, 48)
    assert math.isclose(rope.attention_factor, math.sqrt(1 + math.log(32) / math.log(4096)))
    assert spec_of(
        published.PHI3_MINI_128K, rope_scaling={**published.PHI3_MINI_128K["rope_scaling"], "type": "su"}
    )


def test_a_model_has_the_long_factors_if_its_context_may_need_them():
    rope = spec_of(published.PHI3_MINI_128K).layers[0].rope
    plain = frequencies(DefaultRope(theta=rope.theta), 96, 0)
    for max_positions, factors in ((4096, rope.short), (4097, rope.long), (131072, rope.long)):
        torch.testing.assert_close(frequencies(rope, 96, max_positions), plain / torch.tensor(factors))


def test_smollm3():
    spec = spec_of(published.SMOLLM3_3B)
    assert [isinstance(layer.rope, NoRope) for layer in spec.layers] == [False, False, False, True] * 9
    assert spec.is_head_tied
    by_interval = {key: value for key, value in published.SMOLLM3_3B.items() if key != "no_rope_layers"}
    assert spec_of(by_interval) == spec


def test_experts():
    for config, num, per_token, size, is_normalized in (
        (published.MIXTRAL_8X7B, 8, 2, 14336, True),
        (published.QWEN15_MOE, 60, 4, 1408, False),
        (published.QWEN3_30B_A3B, 128, 8, 768, True),
        (published.QWEN3_CODER_30B, 128, 8, 768, True),
        (published.OLMOE_1B_7B, 64, 8, 1024, False),
    ):
        for layer in spec_of(config).layers:
            experts = layer.experts
            assert experts is not None
            found = (experts.num_experts, experts.num_per_token, experts.intermediate_size)
            assert found == (num, per_token, size)
            assert experts.is_normalized == is_normalized
            assert (experts.shared is not None) == (config is published.QWEN15_MOE)
    assert spec_of(published.OLMOE_1B_7B).qk_norm == "all"
    assert spec_of(published.QWEN3_30B_A3B).qk_norm == "head"


def test_layers_of_qwen3_moe_without_experts():
    spec = spec_of(published.QWEN3_30B_A3B, decoder_sparse_step=3, mlp_only_layers=[2, 7])
    assert [layer for layer in range(48) if spec.layers[layer].experts] == [*range(5, 48, 3)]


REFUSED = [
    (published.GEMMA2_27B, {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
    (published.GEMMA2_27B, {"hidden_activation": "gelu"}, "hidden_activation 'gelu'"),
    (published.PHI4_MINI, {"lm_head_bias": True}, "lm_head_bias True"),
    (published.PHI3_MINI_4K, {"attention_bias": True}, "attention_bias True"),
    (
        published.PHI4_MINI,
        {"rope_scaling": {**published.PHI4_MINI["rope_scaling"], "short_mscale": 1.2}},
        "short_mscale",
    ),
    (published.OLMO2_7B, {"sliding_window": 4096}, "sliding_window 4096"),  # OLMo 3
    (published.SMOLLM3_3B, {"layer_types": ["sliding_attention"] * 36}, "sliding_attention"),
    (published.MIXTRAL_8X7B, {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    (published.QWEN3_30B_A3B, {"use_sliding_window": True}, "use_sliding_window True"),
    (
        published.QWEN3_30B_A3B,
        {"shared_expert_intermediate_size": 768},
        "shared_expert_intermediate_size 768",
    ),
    (published.QWEN3_30B_A3B, {"use_qk_norm": False}, "use_qk_norm False"),
    (published.OLMOE_1B_7B, {"clip_qkv": 8.0}, "clip_qkv 8.0"),
]


@pytest.mark.parametrize(("config", "changes", "finding"), REFUSED)
def test_what_is_not_implemented_is_refused_by_key_and_value(config, changes, finding):
    with pytest.raises(UnsupportedModelError, match=finding):
        spec_of(config, **changes)


WRONG = [
    (published.GEMMA2_27B, {"attn_logit_softcapping": -1}, "attn_logit_softcapping is -1"),
    (published.GEMMA2_27B, {"query_pre_attn_scalar": None}, "no query_pre_attn_scalar"),
    (published.PHI4_MINI, {"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5"),
    (published.PHI4_MINI, {"partial_rotary_factor": 0.5}, "short_factor has 48 numbers for 32 pairs"),
    (published.PHI3_MINI_128K, {"rope_scaling": {"type": "longrope"}}, "no short_factor"),
    (
        published.PHI3_MINI_128K,
        {"rope_scaling": {"type": "longrope", "short_factor": [1, "2"], "long_factor": [1]}},
        "short_factor is .*, not a list of positive numbers",
    ),
    (published.SMOLLM3_3B, {"no_rope_layers": [1, 0]}, "no_rope_layers is .*, not 36 times 0 or 1"),
    (published.MIXTRAL_8X7B, {"num_local_experts": None}, "no num_local_experts"),
    (published.QWEN3_30B_A3B, {"num_experts": None}, "no num_experts"),
    (published.QWEN3_30B_A3B, {"num_experts_per_tok": 129}, "129 experts for each token, but only 128"),
    (published.QWEN3_30B_A3B, {"mlp_only_layers": ["0"]}, "mlp_only_layers is .*, not a list of integers"),
]


@pytest.mark.parametrize(("config", "changes", "finding"), WRONG)
def test_a_config_that_cannot_be_right_is_refused_by_key(config, changes, finding):
    with pytest.raises(SourceError, match=finding) as caught:
        spec_of(config, **changes)
    assert caught.value.fix
