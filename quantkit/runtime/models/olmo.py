"""OLMo 2 (norms after attention and MLP alone) and OLMoE (experts); both norm all queries, and all keys, at once.

OLMo 2 multiplies by a norm's weight before it rounds, the others and this runtime after: the same in float32, the last
bit of 16 otherwise.
"""

from quantkit.arch.experts import EXPERTS
from quantkit.runtime.models.config import Config
from quantkit.runtime.models.rope import read_rope
from quantkit.runtime.models.spec import DecoderSpec, ExpertsSpec, LayerSpec, Norms


def read_olmo2(config: Config) -> DecoderSpec:
    """`attention_bias` covers all four projections."""
    return _read(config, "olmo2", experts=None, norms=Norms.AFTER)


def read_olmoe(config: Config) -> DecoderSpec:
    """`clip_qkv` is null in the published ones, and refused otherwise. `intermediate_size` is an expert's."""
    experts = ExpertsSpec(
        num_experts=config.integer("num_experts"),
        num_per_token=config.integer("num_experts_per_tok"),
        intermediate_size=config.integer("intermediate_size"),
        is_normalized=config.flag("norm_topk_prob", False),
        router="mlp.gate",
        names=EXPERTS["olmoe"],
    )
    return _read(config, "olmoe", experts=experts, norms=Norms.BEFORE)


def _read(config: Config, family: str, *, experts: ExpertsSpec | None, norms: Norms) -> DecoderSpec:
    num_heads = config.integer("num_attention_heads")
    hidden_size = config.integer("hidden_size")
    head_dim = config.integer("head_dim", hidden_size // num_heads)
    max_positions = config.integer("max_position_embeddings")
    bias = config.flag("attention_bias", False)
    layer = LayerSpec(rope=read_rope(config, max_positions), experts=experts)
    return DecoderSpec(
        family=family,
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=config.integer("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=config.integer("num_key_value_heads", num_heads),
        head_dim=head_dim,
        max_positions=max_positions,
        norm_eps=config.number("rms_norm_eps"),
        layers=(layer,) * config.integer("num_hidden_layers"),
        is_head_tied=config.flag("tie_word_embeddings", False),
        activation=config.choice("hidden_act", {"silu": "silu"}),
        has_qkv_bias=bias,
        has_o_bias=bias,
        qk_norm="all",
        norms=norms,
        attention_scale=head_dim**-0.5,
    )
