"""Gemma 3, the language model: scaled embeddings, (1 + w) norms around attention and MLP, norms on q and k,
a window on five of six layers, and a rotation of its own for those.

The defaults are those of transformers' Gemma3TextConfig: the published 4B to 27B checkpoints leave most keys out.
"""

from quantkit.runtime.layers.rotary import DefaultRope, Rope
from quantkit.runtime.models.config import Config
from quantkit.runtime.models.rope import read_rope_section
from quantkit.runtime.models.spec import DecoderSpec, LayerSpec, Norms

LAYER_TYPES = ("full_attention", "sliding_attention")
GLOBAL_THETA, LOCAL_THETA = 1_000_000.0, 10_000.0


def read_gemma3(config: Config) -> DecoderSpec:
    """`attn_logit_softcapping` is refused: no published Gemma 3 sets it, and transformers ignores it."""
    hidden_size = config.integer("hidden_size")
    max_positions = config.integer("max_position_embeddings", 131_072)
    bias = config.flag("attention_bias", False)
    return DecoderSpec(
        family="gemma3",
        vocab_size=config.integer("vocab_size", 262_208),
        hidden_size=hidden_size,
        intermediate_size=config.integer("intermediate_size"),
        num_heads=config.integer("num_attention_heads", 8),
        num_kv_heads=config.integer("num_key_value_heads", 4),
        head_dim=config.integer("head_dim", 256),
        max_positions=max_positions,
        norm_eps=config.number("rms_norm_eps", 1e-6),
        layers=_layers(config, max_positions),
        is_head_tied=config.flag("tie_word_embeddings", True),
        activation=config.choice(
            "hidden_activation", {"gelu_pytorch_tanh": "gelu_tanh"}, "gelu_pytorch_tanh"
        ),
        has_qkv_bias=bias,
        has_o_bias=bias,
        qk_norm="head",
        norms=Norms.AROUND,
        norm_plus_one=True,
        attention_scale=config.number("query_pre_attn_scalar", 256.0) ** -0.5,
        embedding_multiplier=hidden_size**0.5,
        logit_softcap=config.optional_number("final_logit_softcapping"),
    )


def _layers(config: Config, max_positions: int) -> tuple[LayerSpec, ...]:
    num_layers = config.integer("num_hidden_layers")
    pattern = config.integer("sliding_window_pattern", 6)
    types = config.names("layer_types", LAYER_TYPES, num_layers)
    if types is None:
        types = tuple(LAYER_TYPES[(layer + 1) % pattern != 0] for layer in range(num_layers))
    full, local = _ropes(config, max_positions)
    window = config.integer("sliding_window", 4096)
    kinds = {
        "full_attention": LayerSpec(rope=full),
        "sliding_attention": LayerSpec(rope=local, window=window),
    }
    return tuple(kinds[name] for name in types)


def _ropes(config: Config, max_positions: int) -> tuple[Rope, Rope]:
    """Rotations of full and of sliding layers; `rope_scaling`, where it is used, is for the full ones only."""
    full_theta = config.number("rope_theta", GLOBAL_THETA)
    local_theta = config.number("rope_local_base_freq", LOCAL_THETA)
    nested = config.section("rope_parameters")
    scaling = config.section("rope_scaling")
    full = nested.section("full_attention") if nested is not None else scaling
    local = nested.section("sliding_attention") if nested is not None else None
    if nested is not None:
        nested.finish_strictly()
    return _rope(full, full_theta, max_positions), _rope(local, local_theta, max_positions)


def _rope(section: Config | None, theta: float, max_positions: int) -> Rope:
    if section is None:
        return DefaultRope(theta=theta)
    return read_rope_section(section, theta=theta, original=None, max_positions=max_positions)
