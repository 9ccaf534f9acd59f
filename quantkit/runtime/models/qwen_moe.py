"""Qwen2-MoE (one expert is shared by all tokens) and Qwen3-MoE: experts in place of the MLP, in all layers or some."""

from typing import Literal

from quantkit.arch.experts import EXPERTS
from quantkit.runtime.models.config import Config
from quantkit.runtime.models.rope import read_rope
from quantkit.runtime.models.spec import DecoderSpec, ExpertsSpec, LayerSpec, SharedExpertSpec


def read_qwen2_moe(config: Config) -> DecoderSpec:
    """Biases on q, k and v are part of the architecture, unless `qkv_bias` says otherwise."""
    hidden_size, num_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    shared = SharedExpertSpec(
        intermediate_size=config.integer("shared_expert_intermediate_size"),
        name="mlp.shared_expert",
        gate="mlp.shared_expert_gate",
    )
    return _read(
        config,
        "qwen2_moe",
        config.integer("head_dim", hidden_size // num_heads),
        shared,
        has_qkv_bias=config.flag("qkv_bias", True),
        has_o_bias=False,
        qk_norm=None,
    )


def read_qwen3_moe(config: Config) -> DecoderSpec:
    """`use_qk_norm`, where it stands, says what always is."""
    bias = config.flag("attention_bias", False)
    if not config.flag("use_qk_norm", True):
        raise config.unsupported("use_qk_norm", False, "supported: absent or true")
    head_dim = config.integer("head_dim")
    return _read(config, "qwen3_moe", head_dim, None, has_qkv_bias=bias, has_o_bias=bias, qk_norm="head")


def _read(
    config: Config,
    family: str,
    head_dim: int,
    shared: SharedExpertSpec | None,
    *,
    has_qkv_bias: bool,
    has_o_bias: bool,
    qk_norm: Literal["head"] | None,
) -> DecoderSpec:
    """Windows are refused: no published model uses one."""
    num_heads = config.integer("num_attention_heads")
    max_positions = config.integer("max_position_embeddings")
    config.ignore("sliding_window")  # without use_sliding_window its value means nothing
    return DecoderSpec(
        family=family,
        vocab_size=config.integer("vocab_size"),
        hidden_size=config.integer("hidden_size"),
        intermediate_size=config.integer("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=config.integer("num_key_value_heads", num_heads),
        head_dim=head_dim,
        max_positions=max_positions,
        norm_eps=config.number("rms_norm_eps"),
        layers=_layers(config, _experts(config, family, shared), max_positions),
        is_head_tied=config.flag("tie_word_embeddings", False),
        activation=config.choice("hidden_act", {"silu": "silu"}),
        has_qkv_bias=has_qkv_bias,
        has_o_bias=has_o_bias,
        qk_norm=qk_norm,
        attention_scale=head_dim**-0.5,
    )


def _layers(config: Config, experts: ExpertsSpec, max_positions: int) -> tuple[LayerSpec, ...]:
    """Every `decoder_sparse_step`-th layer has experts, but for those listed in `mlp_only_layers`."""
    num_layers = config.integer("num_hidden_layers")
    config.names("layer_types", ("full_attention",), num_layers)
    rope, step = read_rope(config, max_positions), config.integer("decoder_sparse_step", 1)
    dense = config.integers("mlp_only_layers") or ()
    return tuple(
        LayerSpec(rope=rope, experts=None if layer in dense or (layer + 1) % step else experts)
        for layer in range(num_layers)
    )


def _experts(config: Config, family: str, shared: SharedExpertSpec | None) -> ExpertsSpec:
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
        names=EXPERTS[family],
        shared=shared,
    )
