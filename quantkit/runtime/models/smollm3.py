"""SmolLM3: Llama whose every fourth layer does not rotate."""

from quantkit.runtime.layers.rotary import NoRope
from quantkit.runtime.models.config import Config
from quantkit.runtime.models.rope import read_rope
from quantkit.runtime.models.spec import DecoderSpec, LayerSpec

LAYER_TYPES = ("full_attention", "sliding_attention")


def read_smollm3(config: Config) -> DecoderSpec:
    """The published config says `pretraining_tp` 2, which changes nothing here."""
    config.ignore("pretraining_tp")
    num_heads = config.integer("num_attention_heads")
    hidden_size = config.integer("hidden_size")
    head_dim = config.integer("head_dim", hidden_size // num_heads)
    max_positions = config.integer("max_position_embeddings")
    bias = config.flag("attention_bias", False)
    return DecoderSpec(
        family="smollm3",
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=config.integer("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=config.integer("num_key_value_heads", num_heads),
        head_dim=head_dim,
        max_positions=max_positions,
        norm_eps=config.number("rms_norm_eps"),
        layers=_layers(config, max_positions),
        is_head_tied=config.flag("tie_word_embeddings", True),
        activation=config.choice("hidden_act", {"silu": "silu"}),
        has_qkv_bias=bias,
        has_o_bias=bias,
        has_mlp_bias=config.flag("mlp_bias", False),
        attention_scale=head_dim**-0.5,
    )


def _layers(config: Config, max_positions: int) -> tuple[LayerSpec, ...]:
    rope, is_rotated = read_rope(config, max_positions), _is_rotated(config)
    types = config.names("layer_types", LAYER_TYPES, len(is_rotated))
    config.ignore("sliding_window")  # without use_sliding_window its value means nothing
    if not config.flag("use_sliding_window", False):
        if types is not None and "sliding_attention" in types:
            raise config.unsupported("layer_types", "sliding_attention", "set use_sliding_window to match")
        return tuple(LayerSpec(rope=rope if rotated else NoRope()) for rotated in is_rotated)
    window = config.integer("sliding_window")
    if types is None:
        types = tuple(LAYER_TYPES[not rotated] for rotated in is_rotated)
    return tuple(
        LayerSpec(rope=rope if rotated else NoRope(), window=window if name == "sliding_attention" else None)
        for rotated, name in zip(is_rotated, types, strict=True)
    )


def _is_rotated(config: Config) -> list[bool]:
    """Of each layer. The key `no_rope_layers` has 1 where there is a rotation."""
    num_layers = config.integer("num_hidden_layers")
    flags = config.integers("no_rope_layers")
    if flags is None:
        interval = config.integer("no_rope_layer_interval", 4)
        return [(layer + 1) % interval != 0 for layer in range(num_layers)]
    if len(flags) < num_layers or not set(flags) <= {0, 1}:
        raise config.wrong("no_rope_layers", list(flags), f"{num_layers} times 0 or 1")
    return [flag == 1 for flag in flags[:num_layers]]
