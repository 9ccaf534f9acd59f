"""Qwen3-MoE: Qwen3 with experts in place of the MLP, in all layers or in some."""

from quantkit.arch.experts import EXPERTS
from quantkit.runtime.models.config import Config
from quantkit.runtime.models.rope import read_rope
from quantkit.runtime.models.spec import DecoderSpec, ExpertsSpec, LayerSpec


def read_qwen3_moe(config: Config) -> DecoderSpec:
    """Windows are refused: no published Qwen3-MoE uses one. `use_qk_norm`, where it stands, says what always is."""
    num_heads = config.integer("num_attention_heads")
    head_dim = config.integer("head_dim")
    max_positions = config.integer("max_position_embeddings")
    bias = config.flag("attention_bias", False)
    config.ignore("sliding_window")  # without use_sliding_window its value means nothing
    if not config.flag("use_qk_norm", True):
        raise config.unsupported("use_qk_norm", False, "supported: absent or true")
    return DecoderSpec(
        family="qwen3_moe",
        vocab_size=config.integer("vocab_size"),
        hidden_size=config.integer("hidden_size"),
        intermediate_size=config.integer("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=config.integer("num_key_value_heads", num_heads),
        head_dim=head_dim,
        max_positions=max_positions,
        norm_eps=config.number("rms_norm_eps"),
        layers=_layers(config, max_positions),
        is_head_tied=config.flag("tie_word_embeddings", False),
        activation=config.choice("hidden_act", {"silu": "silu"}),
        has_qkv_bias=bias,
        has_o_bias=bias,
        qk_norm="head",
        attention_scale=head_dim**-0.5,
    )


def _layers(config: Config, max_positions: int) -> tuple[LayerSpec, ...]:
    """Every `decoder_sparse_step`-th layer has experts, but for those listed in `mlp_only_layers`."""
    rope, experts = read_rope(config, max_positions), _experts(config)
    step = config.integer("decoder_sparse_step", 1)
    dense = config.integers("mlp_only_layers") or ()
    return tuple(
        LayerSpec(rope=rope, experts=None if layer in dense or (layer + 1) % step else experts)
        for layer in range(config.integer("num_hidden_layers"))
    )


def _experts(config: Config) -> ExpertsSpec:
    """transformers 5 writes `num_local_experts` for what the published configs call `num_experts`."""
    num_experts = config.optional_integer("num_experts") or config.optional_integer("num_local_experts")
    if num_experts is None:
        raise config.missing("num_experts")
    return ExpertsSpec(
        num_experts=num_experts,
        num_per_token=config.integer("num_experts_per_tok"),
        intermediate_size=config.integer("moe_intermediate_size"),
        is_normalized=config.flag("norm_topk_prob", False),
        router="mlp.gate",
        names=EXPERTS["qwen3_moe"],
    )
