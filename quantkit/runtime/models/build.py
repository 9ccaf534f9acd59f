"""A DecoderSpec and the tensors of a checkpoint, put together. The module names are those on disk."""

from collections.abc import Mapping

from torch import Tensor

from quantkit.runtime.layers.attention import Attention, QKNorms
from quantkit.runtime.layers.build_linear import build_linear
from quantkit.runtime.layers.embedding import Embedding
from quantkit.runtime.layers.linear_part import LinearPart
from quantkit.runtime.layers.mlp import GatedMLP
from quantkit.runtime.layers.moe import SharedExpert, SparseMLP
from quantkit.runtime.layers.norm import RMSNorm, SumOfNorm
from quantkit.runtime.layers.rotary import Angles, Rope, make_angles
from quantkit.runtime.models.decoder import Decoder, DecoderLayer
from quantkit.runtime.models.spec import DecoderSpec, ExpertsSpec, SharedExpertSpec
from quantkit.runtime.weights import Weights
from quantkit_kernels.paged_kv import Masking


def build_decoder(spec: DecoderSpec, weights: Weights) -> Decoder:
    """Read every tensor, layer by layer; quantized linears stay quantized."""
    base, size, target = weights.base, spec.hidden_size, weights.target
    table_VE = weights.tensor(f"{base}embed_tokens.weight", (spec.vocab_size, size))
    ropes = {layer.rope for layer in spec.layers}
    rotary_dim = spec.rotary_dim or spec.head_dim
    angles = {rope: make_angles(rope, rotary_dim, spec.max_positions, target.device) for rope in ropes}
    layers = [_layer(spec, weights, number, angles) for number in range(len(spec.layers))]
    last_layer = f"{base}layers.{len(spec.layers) - 1}"
    norm = _rms_norm(spec, weights, f"{base}norm", inner=_after_mlp(spec, last_layer))
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
    before_attention, after_attention, before_mlp, _ = (
        part and f"{name}.{part}" for part in spec.norms.value
    )
    return DecoderLayer(
        _attention(spec, weights, number, angles[spec.layers[number].rope]),
        _mlp(spec, weights, number),
        before_attention=_norm(spec, weights, before_attention, inner=before),
        before_mlp=_norm(spec, weights, before_mlp, inner=after_attention),
    )


def _attention(spec: DecoderSpec, weights: Weights, number: int, angles: Angles) -> Attention:
    name = f"{weights.base}layers.{number}.self_attn"
    size, head_dim = spec.hidden_size, spec.head_dim
    q_size, kv_size = spec.num_heads * head_dim, spec.num_kv_heads * head_dim
    qkv = {f"{name}.q_proj": q_size, f"{name}.k_proj": kv_size, f"{name}.v_proj": kv_size}
    if spec.has_fused_projections:
        qkv = {f"{name}.qkv_proj": sum(qkv.values())}
    return Attention(
        weights.linear(qkv, size, has_bias=spec.has_qkv_bias),
        weights.linear({f"{name}.o_proj": size}, q_size, has_bias=spec.has_o_bias),
        norms=_qk_norms(spec, weights, name),
        angles=angles,
        masking=Masking(spec.attention_scale, spec.layers[number].window or 0, spec.attention_softcap or 0.0),
        batch_invariant=weights.target.batch_invariant,
    )


def _qk_norms(spec: DecoderSpec, weights: Weights, name: str) -> QKNorms | None:
    if spec.qk_norm is None:
        return None
    q_heads, k_heads = (1, 1) if spec.qk_norm == "head" else (spec.num_heads, spec.num_kv_heads)
    return QKNorms(
        weights.tensor(f"{name}.q_norm.weight", (q_heads * spec.head_dim,)),
        weights.tensor(f"{name}.k_norm.weight", (k_heads * spec.head_dim,)),
        spec.norm_eps,
        spec.norm_plus_one,
        is_per_head=spec.qk_norm == "head",
    )


def _mlp(spec: DecoderSpec, weights: Weights, number: int) -> GatedMLP | SparseMLP:
    experts = spec.layers[number].experts
    if experts is not None:
        return _sparse_mlp(spec, experts, weights, f"{weights.base}layers.{number}")
    return _gated_mlp(spec, weights, f"{weights.base}layers.{number}.mlp", spec.intermediate_size)


def _gated_mlp(spec: DecoderSpec, weights: Weights, name: str, inner: int) -> GatedMLP:
    size, bias = spec.hidden_size, spec.has_mlp_bias
    gate_up = {f"{name}.gate_proj": inner, f"{name}.up_proj": inner}
    if spec.has_fused_projections:
        gate_up = {f"{name}.gate_up_proj": 2 * inner}
    return GatedMLP(
        weights.linear(gate_up, size, has_bias=bias),
        weights.linear({f"{name}.down_proj": size}, inner, has_bias=bias),
        spec.activation,
    )


def _sparse_mlp(spec: DecoderSpec, experts: ExpertsSpec, weights: Weights, layer: str) -> SparseMLP:
    inner, size, names = experts.intermediate_size, spec.hidden_size, experts.names
    gate, up, down = (
        [f"{layer}.{names.linear(number, kind)}" for number in range(experts.num_experts)]
        for kind in (names.gate, names.up, names.down)
    )
    return SparseMLP(
        weights.linear({f"{layer}.{experts.router}": experts.num_experts}, size, has_bias=False),
        weights.experts(gate, up, down, inner, size, spec.activation),
        _shared_expert(spec, experts.shared, weights, layer) if experts.shared is not None else None,
        num_per_token=experts.num_per_token,
        is_normalized=experts.is_normalized,
    )


def _shared_expert(spec: DecoderSpec, shared: SharedExpertSpec, weights: Weights, layer: str) -> SharedExpert:
    return SharedExpert(
        _gated_mlp(spec, weights, f"{layer}.{shared.name}", shared.intermediate_size),
        weights.linear({f"{layer}.{shared.gate}": 1}, spec.hidden_size, has_bias=False),
    )


def _after_mlp(spec: DecoderSpec, layer: str) -> str | None:
    """The norm of what a layer's MLP gives, where the family has one: the norm that comes next does it first."""
    after_mlp = spec.norms.value[3]
    return after_mlp and f"{layer}.{after_mlp}"


def _norm(spec: DecoderSpec, weights: Weights, name: str | None, *, inner: str | None) -> RMSNorm | SumOfNorm:
    if name is not None:
        return _rms_norm(spec, weights, name, inner=inner)
    inner_E = None if inner is None else _norm_weight(spec, weights, inner)
    return SumOfNorm(inner_E, spec.norm_eps, plus_one=spec.norm_plus_one)


def _rms_norm(spec: DecoderSpec, weights: Weights, name: str, *, inner: str | None) -> RMSNorm:
    inner_E = None if inner is None else _norm_weight(spec, weights, inner)
    weight_E = _norm_weight(spec, weights, name)
    return RMSNorm(weight_E, spec.norm_eps, plus_one=spec.norm_plus_one, inner_E=inner_E)


def _norm_weight(spec: DecoderSpec, weights: Weights, name: str) -> Tensor:
    return weights.tensor(f"{name}.weight", (spec.hidden_size,))
