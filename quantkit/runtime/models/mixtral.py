"""Mixtral: Mistral with experts in place of the MLP."""

from quantkit.arch.experts import EXPERTS
from quantkit.runtime.models.config import Config
from quantkit.runtime.models.rope import read_rope
from quantkit.runtime.models.spec import DecoderSpec, ExpertsSpec, LayerSpec


def read_mixtral(config: Config) -> DecoderSpec:
    """`sliding_window` absent or null: none."""
    num_heads = config.integer("num_attention_heads")
    hidden_size = config.integer("hidden_size")
    head_dim = config.integer("head_dim", hidden_size // num_heads)
    max_positions = config.integer("max_position_embeddings")
    intermediate_size = config.integer("intermediate_size")
    experts = ExpertsSpec(
        num_experts=config.integer("num_local_experts"),
        num_per_token=config.integer("num_experts_per_tok"),
        intermediate_size=intermediate_size,
        is_normalized=True,
        router="block_sparse_moe.gate",
        names=EXPERTS["mixtral"],
    )
    rope = read_rope(config, max_positions)
    layer = LayerSpec(rope=rope, window=config.optional_integer("sliding_window"), experts=experts)
    return DecoderSpec(
        family="mixtral",
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_heads=num_heads,
        num_kv_heads=config.integer("num_key_value_heads", num_heads),
        head_dim=head_dim,
        max_positions=max_positions,
        norm_eps=config.number("rms_norm_eps"),
        layers=(layer,) * config.integer("num_hidden_layers"),
        is_head_tied=config.flag("tie_word_embeddings", False),
        activation=config.choice("hidden_act", {"silu": "silu"}),
        attention_scale=head_dim**-0.5,
    )
