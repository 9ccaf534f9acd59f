"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: q, k, v and gate, up fused on disk, LongRoPE in the long-context ones, in
Phi-4-mini a quarter of each head not rotated.
"""

from quantkit.runtime.models.config import Config
from quantkit.runtime.models.rope import read_rope, rope_section
from quantkit.runtime.models.spec import DecoderSpec, LayerSpec


def read_phi3(config: Config) -> DecoderSpec:
    """`sliding_window` null: none. `attention_bias`, `mlp_bias` and `lm_head_bias` are false in all published ones."""
    num_heads = config.integer("num_attention_heads")
    hidden_size = config.integer("hidden_size")
    head_dim = config.integer("head_dim", hidden_size // num_heads)
    max_positions = config.integer("max_position_embeddings")
    layer = LayerSpec(
        rope=read_rope(config, max_positions, rotates_all=False),
        window=config.nullable_integer("sliding_window"),
    )
    return DecoderSpec(
        family="phi3",
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
        has_fused_projections=True,
        rotary_dim=_rotary_dim(config, head_dim),
        attention_scale=head_dim**-0.5,
    )


def _rotary_dim(config: Config, head_dim: int) -> int:
    share = config.number("partial_rotary_factor", 1.0)
    section = rope_section(config)
    if section is not None:
        share = section.number("partial_rotary_factor", share)
    if not 0 < int(head_dim * share) <= head_dim:
        raise config.wrong("partial_rotary_factor", share, f"a share of {head_dim} dimensions")
    return int(head_dim * share)
