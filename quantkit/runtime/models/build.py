"""A DecoderSpec and the tensors of a checkpoint, put together. The module names are those on disk."""

from collections.abc import Mapping

from quantkit.runtime.layers.attention import Attention
from quantkit.runtime.layers.build_linear import build_linear
from quantkit.runtime.layers.embedding import Embedding
from quantkit.runtime.layers.linear_part import LinearPart
from quantkit.runtime.layers.mlp import GatedMLP
from quantkit.runtime.layers.norm import RMSNorm
from quantkit.runtime.layers.rotary import Angles, Rope
from quantkit.runtime.models.decoder import Decoder, DecoderLayer
from quantkit.runtime.models.spec import DecoderSpec
from quantkit.runtime.weights import Weights
from quantkit_kernels.paged_kv import Masking

SPLIT_TOKENS = 512  # parts of a context in a model that no batch changes


def build_decoder(spec: DecoderSpec, weights: Weights) -> Decoder:
    """Read every tensor, layer by layer; quantized linears stay quantized."""
    base, size, target = weights.base, spec.hidden_size, weights.target
    table_VE = weights.tensor(f"{base}embed_tokens.weight", (spec.vocab_size, size))
    ropes = {layer.rope for layer in spec.layers}
    angles = {rope: Angles(rope, spec.head_dim, spec.max_positions, target.device) for rope in ropes}
    layers = [_layer(spec, weights, number, angles) for number in range(len(spec.layers))]
    last_layer = f"{base}layers.{len(spec.layers) - 1}"
    norm = _norm(spec, weights, f"{base}norm", inner=_after_mlp(spec, last_layer))
    if spec.is_head_tied:
        weights.skip_tied_head()
        head = build_linear([LinearPart(weights.head, table_VE)], target)
    else:
        head = weights.linear({weights.head: spec.vocab_size}, size, has_bias=False)
    weights.finish()
    embedding = Embedding(table_VE, spec.embedding_multiplier)
    return Decoder(embedding, layers, norm, head, logit_softcap=spec.logit_softcap)


def _layer(spec: DecoderSpec, weights: Weights, number: int, angles: Mapping[Rope, Angles]) -> DecoderLayer:
    weights.begin_layer(number)
    name = f"{weights.base}layers.{number}"
    before = None if number == 0 else _after_mlp(spec, f"{weights.base}layers.{number - 1}")
    sandwich = spec.has_sandwich_norms
    before_mlp = "pre_feedforward_layernorm" if sandwich else "post_attention_layernorm"
    after_attention = f"{name}.post_attention_layernorm" if sandwich else None
    return DecoderLayer(
        _attention(spec, weights, number, angles[spec.layers[number].rope]),
        _mlp(spec, weights, f"{name}.mlp"),
        before_attention=_norm(spec, weights, f"{name}.input_layernorm", inner=before),
        before_mlp=_norm(spec, weights, f"{name}.{before_mlp}", inner=after_attention),
    )


def _attention(spec: DecoderSpec, weights: Weights, number: int, angles: Angles) -> Attention:
    name = f"{weights.base}layers.{number}.self_attn"
    size, head_dim = spec.hidden_size, spec.head_dim
    q_size, kv_size = spec.num_heads * head_dim, spec.num_kv_heads * head_dim
    qkv = {f"{name}.q_proj": q_size, f"{name}.k_proj": kv_size, f"{name}.v_proj": kv_size}
    norms = [
        weights.tensor(f"{name}.{part}_norm.weight", (head_dim,)) if spec.has_qk_norm else None
        for part in "qk"
    ]
    return Attention(
        weights.linear(qkv, size, has_bias=spec.has_qkv_bias),
        weights.linear({f"{name}.o_proj": size}, q_size, has_bias=spec.has_o_bias),
        q_norm_D=norms[0],
        k_norm_D=norms[1],
        norm_eps=spec.norm_eps,
        norm_plus_one=spec.norm_plus_one,
        angles=angles,
        masking=Masking(spec.attention_scale, spec.layers[number].window or 0),
        split_tokens=SPLIT_TOKENS if weights.target.batch_invariant else 0,
    )


def _mlp(spec: DecoderSpec, weights: Weights, name: str) -> GatedMLP:
    inner, size, bias = spec.intermediate_size, spec.hidden_size, spec.has_mlp_bias
    return GatedMLP(
        weights.linear({f"{name}.gate_proj": inner, f"{name}.up_proj": inner}, size, has_bias=bias),
        weights.linear({f"{name}.down_proj": size}, inner, has_bias=bias),
        spec.activation,
    )


def _after_mlp(spec: DecoderSpec, layer: str) -> str | None:
    """The norm of what a layer's MLP gives, where the family has one: the norm that comes next does it first."""
    return f"{layer}.post_feedforward_layernorm" if spec.has_sandwich_norms else None


def _norm(spec: DecoderSpec, weights: Weights, name: str, *, inner: str | None) -> RMSNorm:
    size = (spec.hidden_size,)
    inner_E = None if inner is None else weights.tensor(f"{inner}.weight", size)
    return RMSNorm(
        weights.tensor(f"{name}.weight", size), spec.norm_eps, plus_one=spec.norm_plus_one, inner_E=inner_E
    )
