"""Gemma 2: scaled embeddings, (1 + w) norms around attention and MLP, a window on every other layer, and soft caps on
attention scores and logits.
"""

from quantkit.runtime.models.config import Config
from quantkit.runtime.models.rope import read_rope
from quantkit.runtime.models.spec import DecoderSpec, LayerSpec, Norms

LAYER_TYPES = ("sliding_attention", "full_attention")


def read_gemma2(config: Config) -> DecoderSpec:
    """Soft caps may be null; `query_pre_attn_scalar` is not head_dim in the 27B model."""
    hidden_size = config.integer("hidden_size")
    max_positions = config.integer("max_position_embeddings")
    bias = config.flag("attention_bias", False)
    return DecoderSpec(
        family="gemma2",
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=config.integer("intermediate_size"),
        num_heads=config.integer("num_attention_heads"),
        num_kv_heads=config.integer("num_key_value_heads"),
        head_dim=config.integer("head_dim"),
        max_positions=max_positions,
        norm_eps=config.number("rms_norm_eps"),
        layers=_layers(config, max_positions),
        is_head_tied=config.flag("tie_word_embeddings", True),
        activation=config.choice(
            "hidden_activation", {"gelu_pytorch_tanh": "gelu_tanh"}, "gelu_pytorch_tanh"
        ),
        has_qkv_bias=bias,
        has_o_bias=bias,
        norms=Norms.AROUND,
        norm_plus_one=True,
        attention_scale=config.number("query_pre_attn_scalar") ** -0.5,
        attention_softcap=config.nullable_number("attn_logit_softcapping"),
        embedding_multiplier=hidden_size**0.5,
        logit_softcap=config.nullable_number("final_logit_softcapping"),
    )


def _layers(config: Config, max_positions: int) -> tuple[LayerSpec, ...]:
    num_layers = config.integer("num_hidden_layers")
    types = config.names("layer_types", LAYER_TYPES, num_layers)
    if types is None:
        types = tuple(LAYER_TYPES[layer % 2] for layer in range(num_layers))
    rope, window = read_rope(config, max_positions), config.integer("sliding_window")
    return tuple(
        LayerSpec(rope=rope, window=window if name == "sliding_attention" else None) for name in types
    )
