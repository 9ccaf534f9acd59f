"""Mistral 7B to Nemo: Llama without biases, with one sliding window over all layers (or none)."""

from quantkit.runtime.models.config import Config
from quantkit.runtime.models.rope import read_rope
from quantkit.runtime.models.spec import DecoderSpec, LayerSpec


def read_mistral(config: Config) -> DecoderSpec:
    """`sliding_window` null: none."""
    num_heads = config.integer("num_attention_heads")
    hidden_size = config.integer("hidden_size")
    head_dim = config.integer("head_dim", hidden_size // num_heads)
    max_positions = config.integer("max_position_embeddings")
    layer = LayerSpec(rope=read_rope(config, max_positions), window=config.nullable_integer("sliding_window"))
    return DecoderSpec(
        family="mistral",
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
        attention_scale=head_dim**-0.5,
    )
