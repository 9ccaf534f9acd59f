"""What feeds what in a decoder layer: where a scale or a rotation can move from one weight to the next.

Names are those on disk, below the layer, {} for an expert's number. What is absent cannot be folded: a norm
that is not followed by linears alone, or whose output is added to the residual stream, is in no pair.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from quantkit.arch.names import place_of
from quantkit.formats.checkpoint import Checkpoint

# of every family whose stream rotates
EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens", "model.norm", "lm_head"


class Link(enum.Enum):
    """How the channels of `prev` become the inputs of `to`; of a fused linear they are the last rows."""

    NORM = "a norm that multiplies channels by its weight"
    NORM_PLUS_ONE = "a norm that multiplies channels by 1 + its weight"
    VALUES = "values: attention mixes tokens, and each head is read by all query heads that share it"
    PRODUCT = "the half of a gated MLP that is no argument of the activation"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """`to` are all linears that read what `prev` computes; routers too, though they are never quantized."""

    prev: str
    to: tuple[str, ...]
    link: Link


class Heads(NamedTuple):
    """Query heads, key-value heads, channels of each: o_proj reads num · dim, values have num_kv · dim."""

    num: int
    num_kv: int
    dim: int


def read_heads(checkpoint: Checkpoint) -> Heads:
    """The heads of a checkpoint's attention, by config.json and, where it is silent, transformers' defaults."""
    from quantkit.arch.skeleton import language_config  # transformers takes seconds to import

    config = language_config(checkpoint).to_dict()
    num, dim = config["num_attention_heads"], config.get("head_dim")
    num_kv = config.get("num_key_value_heads")
    return Heads(num, num_kv or num, dim or config["hidden_size"] // num)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wiring:
    """One family. Pairs are in the order of computation.

    writers: linears whose outputs are added to the residual stream; the norm pairs are what reads it.
    unrotatable: why that stream cannot be rotated, or None. no_values_if: a key of config.json that puts something
    between v and o when it is set.
    """

    pairs: tuple[Pair, ...]
    writers: tuple[str, ...]
    unrotatable: str | None = None
    no_values_if: str | None = None


class LayerWiring(NamedTuple):
    """The pairs and writers that one layer of a checkpoint has, experts by number; names below `prefix`."""

    prefix: str
    pairs: tuple[Pair, ...]
    writers: tuple[str, ...]


def layer_wiring(checkpoint: Checkpoint, layer: int) -> LayerWiring:
    """What can be folded in this layer of a known family; reads tensor names only."""
    wiring = WIRINGS[checkpoint.model_type]
    names = [name.removesuffix(".weight") for name in checkpoint.tensors if f".{layer}." in name]
    here = [place for place in map(place_of, names) if place and place.layer == layer]
    assert here, "the plan has checked that the layer is there"
    present = {place.rest for place in here}
    experts = sorted({place.expert for place in here if place.expert is not None})
    is_clipped = (
        wiring.no_values_if is not None and checkpoint.text_config.get(wiring.no_values_if) is not None
    )
    pairs = [
        pair
        for pair in wiring.pairs
        if present.issuperset({pair.prev, *pair.to}) and not (is_clipped and pair.link is Link.VALUES)
    ]
    return LayerWiring(
        prefix=here[0].prefix,
        pairs=tuple(each for pair in pairs for each in _numbered(pair, experts)),
        writers=_numbers([name for name in wiring.writers if name in present], experts),
    )


def why_unrotatable(checkpoint: Checkpoint) -> str | None:
    """Why the residual stream of a checkpoint of a known family cannot be rotated, or None if it can."""
    wiring = WIRINGS[checkpoint.model_type]
    if wiring.unrotatable is None and checkpoint.text_config is not checkpoint.config:
        return IMAGES
    return wiring.unrotatable


def _numbered(pair: Pair, experts: list[int]) -> tuple[Pair, ...]:
    """A pair inside an expert once per expert; of any other, the experts that it feeds are listed in `to`."""
    if "{}" in pair.prev:
        return tuple(
            replace(pair, prev=pair.prev.format(expert), to=tuple(name.format(expert) for name in pair.to))
            for expert in experts
        )
    return (replace(pair, to=_numbers(pair.to, experts)),)


def _numbers(names: tuple[str, ...] | list[str], experts: list[int]) -> tuple[str, ...]:
    return tuple(name.format(expert) for name in names for expert in (experts if "{}" in name else range(1)))


def _attention(norm: str | None, link: Link = Link.NORM) -> tuple[Pair, ...]:
    inputs = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    values = Pair(prev="self_attn.v_proj", to=("self_attn.o_proj",), link=Link.VALUES)
    return (Pair(prev=norm, to=inputs, link=link), values) if norm else (values,)


def _gated(parent: str, up: str = "up_proj", down: str = "down_proj") -> Pair:
    return Pair(prev=f"{parent}.{up}", to=(f"{parent}.{down}",), link=Link.PRODUCT)


def _mlp(norm: str | None, link: Link = Link.NORM) -> tuple[Pair, ...]:
    if norm is None:
        return (_gated("mlp"),)
    return (Pair(prev=norm, to=("mlp.gate_proj", "mlp.up_proj"), link=link), _gated("mlp"))


def _sparse(*shared: str) -> tuple[Pair, ...]:
    readers = ("mlp.gate", "mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj", *shared)
    return (
        Pair(prev="post_attention_layernorm", to=readers, link=Link.NORM),
        _gated("mlp.experts.{}"),
    )


IMAGES = "images enter its residual stream too, from a tower that would have to be rotated with it"
POST_NORM = (
    "its layers add the output of a norm to the residual stream, and that norm's weight does not rotate"
)

ATTENTION = _attention("input_layernorm")
DENSE = (*ATTENTION, *_mlp("post_attention_layernorm"))
OUTPUTS = ("self_attn.o_proj", "mlp.down_proj")

LLAMA = Wiring(pairs=DENSE, writers=OUTPUTS)
GEMMA2 = Wiring(
    pairs=(
        *_attention("input_layernorm", Link.NORM_PLUS_ONE),
        *_mlp("pre_feedforward_layernorm", Link.NORM_PLUS_ONE),
    ),
    writers=OUTPUTS,
    unrotatable=POST_NORM,
)
OLMO2 = Wiring(pairs=(*_attention(None), *_mlp(None)), writers=OUTPUTS, unrotatable=POST_NORM)
PHI3 = Wiring(
    pairs=(
        Pair(prev="input_layernorm", to=("self_attn.qkv_proj",), link=Link.NORM),
        Pair(prev="self_attn.qkv_proj", to=("self_attn.o_proj",), link=Link.VALUES),
        Pair(prev="post_attention_layernorm", to=("mlp.gate_up_proj",), link=Link.NORM),
        _gated("mlp", up="gate_up_proj"),
    ),
    writers=OUTPUTS,
)
MIXTRAL = Wiring(
    pairs=(
        *ATTENTION,
        Pair(
            prev="post_attention_layernorm",
            to=(
                "block_sparse_moe.gate",
                "block_sparse_moe.experts.{}.w1",
                "block_sparse_moe.experts.{}.w3",
            ),
            link=Link.NORM,
        ),
        _gated("block_sparse_moe.experts.{}", up="w3", down="w2"),
    ),
    writers=("self_attn.o_proj", "block_sparse_moe.experts.{}.w2"),
)
QWEN3_MOE = Wiring(pairs=(*DENSE, *_sparse()), writers=(*OUTPUTS, "mlp.experts.{}.down_proj"))
OLMOE = replace(QWEN3_MOE, no_values_if="clip_qkv")
QWEN2_MOE = Wiring(
    pairs=(
        *DENSE,
        *_sparse("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert_gate"),
        _gated("mlp.shared_expert"),
    ),
    writers=(*QWEN3_MOE.writers, "mlp.shared_expert.down_proj"),
)

TEXT_OF_IMAGES = replace(LLAMA, unrotatable=IMAGES)

WIRINGS: Mapping[str, Wiring] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen2_vl": TEXT_OF_IMAGES,
    "qwen2_vl_text": TEXT_OF_IMAGES,
    "qwen2_5_vl": TEXT_OF_IMAGES,
    "qwen2_5_vl_text": TEXT_OF_IMAGES,
    "qwen3": LLAMA,
    "qwen3_vl_text": TEXT_OF_IMAGES,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA2,
    "olmo2": OLMO2,
    "smollm3": LLAMA,
    "phi3": PHI3,
    "mixtral": MIXTRAL,
    "olmoe": OLMOE,
    "qwen3_moe": QWEN3_MOE,
    "qwen2_moe": QWEN2_MOE,
}
