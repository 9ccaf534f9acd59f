"""What distinguishes one decoder from another, as data."""

import enum
from dataclasses import dataclass
from typing import Literal

from quantkit.arch.experts import ExpertNames
from quantkit.runtime.layers.mlp import Activation
from quantkit.runtime.layers.rotary import Rope


class Norms(enum.Enum):
    """Where the norms of a layer are; the residual is added after all of them. Value: names on disk of the norms
    before and after attention, before and after the MLP."""

    BEFORE = ("input_layernorm", None, "post_attention_layernorm", None)
    AFTER = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")
    AROUND = (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedExpertSpec:
    """A gated MLP that every token goes to, times the sigmoid of a gate [1, E].

    name, gate: on disk, below the layer.
    """

    intermediate_size: int
    name: str
    gate: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsSpec:
    """A router and the gated MLPs that it chooses among, for each token.

    router, names: on disk, below the layer. is_normalized: a token's weights are divided by their sum.
    """

    num_experts: int
    num_per_token: int
    intermediate_size: int
    is_normalized: bool
    router: str
    names: ExpertNames
    shared: SharedExpertSpec | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """What differs between layers. window: last tokens that a token sees, its own included; None: all.

    experts: in place of the MLP.
    """

    rope: Rope
    window: int | None = None
    experts: ExpertsSpec | None = None


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
    has_fused_projections: bool = False  # on disk: qkv_proj, gate_up_proj
    qk_norm: Literal["head", "all"] | None = (
        None  # of queries and keys: each head alone, or all of them at once
    )
    norms: Norms = Norms.BEFORE
    norm_plus_one: bool = False  # the stored norm weight is around 0
    rotary_dim: int | None = None  # dimensions of each head that are rotated, the first ones; None: all
    attention_scale: float
    attention_softcap: float | None = None
    embedding_multiplier: float = 1.0
    logit_softcap: float | None = None
