"""Qwen2, Qwen2.5 (biases on q, k, v) and Qwen3 (norms on q and k); the later layers may have a sliding window."""

from typing import Literal

from quantkit.runtime.models.config import Config
from quantkit.runtime.models.rope import read_rope
from quantkit.runtime.models.spec import DecoderSpec, LayerSpec

LAYER_TYPES = ("full_attention", "sliding_attention")


def read_qwen2(config: Config) -> DecoderSpec:
    """Biases on q, k and v are part of the architecture; no key says so."""
    hidden_size, num_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    head_dim = config.integer("head_dim", hidden_size // num_heads)
    return _read(config, "qwen2", head_dim, has_qkv_bias=True, has_o_bias=False, qk_norm=None)


def read_qwen3(config: Config) -> DecoderSpec:
    """`head_dim` is independent of the hidden size; `attention_bias` covers all four projections."""
    bias = config.flag("attention_bias", False)
    head_dim = config.integer("head_dim")
    return _read(config, "qwen3", head_dim, has_qkv_bias=bias, has_o_bias=bias, qk_norm="head")


def _read(
    config: Config,
    family: str,
    head_dim: int,
    *,
    has_qkv_bias: bool,
    has_o_bias: bool,
    qk_norm: Literal["head"] | None,
) -> DecoderSpec:
    num_heads = config.integer("num_attention_heads")
    max_positions = config.integer("max_position_embeddings")
    rope = read_rope(config, max_positions)
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
        layers=tuple(LayerSpec(rope=rope, window=window) for window in _windows(config)),
        is_head_tied=config.flag("tie_word_embeddings", False),
        activation=config.choice("hidden_act", {"silu": "silu"}),
        has_qkv_bias=has_qkv_bias,
        has_o_bias=has_o_bias,
        qk_norm=qk_norm,
        attention_scale=head_dim**-0.5,
    )


def _windows(config: Config) -> list[int | None]:
    """The window of each layer: `layer_types` if given, else layers from `max_window_layers` on."""
    num_layers = config.integer("num_hidden_layers")
    types = config.names("layer_types", LAYER_TYPES, num_layers)
    config.ignore("sliding_window")  # without use_sliding_window its value means nothing
    if not config.flag("use_sliding_window", False):
        if types is not None and "sliding_attention" in types:
            raise config.unsupported("layer_types", "sliding_attention", "set use_sliding_window to match")
        return [None] * num_layers
    window = config.integer("sliding_window")
    if types is None:
        first = config.integer("max_window_layers")
        types = tuple(LAYER_TYPES[layer >= first] for layer in range(num_layers))
    return [window if name == "sliding_attention" else None for name in types]
