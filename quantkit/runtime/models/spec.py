"""What distinguishes one decoder from another, as data."""

from dataclasses import dataclass

from quantkit.runtime.layers.mlp import Activation
from quantkit.runtime.layers.rotary import Rope


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """What differs between layers. window: last tokens that a token sees, its own included; None: all."""

    rope: Rope
    window: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec:
    """A decoder-only transformer with RMS norms, rotary positions, grouped-query attention and a gated MLP."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    layers: tuple[LayerSpec, ...]
    is_head_tied: bool
    activation: Activation = "silu"
    has_qkv_bias: bool = False
    has_o_bias: bool = False
    has_mlp_bias: bool = False
    has_qk_norm: bool = False
    has_sandwich_norms: bool = False  # a norm after attention and MLP too, before the residual is added
    norm_plus_one: bool = False  # the stored norm weight is around 0
    attention_scale: float
    embedding_multiplier: float = 1.0
    logit_softcap: float | None = None
