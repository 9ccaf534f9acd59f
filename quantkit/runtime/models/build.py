"""A DecoderSpec and the tensors of a checkpoint, put together. The module names are those on disk."""

from torch import nn

from quantkit.runtime.heap import release_freed_memory
from quantkit.runtime.layers.attention import Attention
from quantkit.runtime.layers.embedding import Embedding
from quantkit.runtime.layers.linear import Linear
from quantkit.runtime.layers.mlp import GatedMLP
from quantkit.runtime.layers.norm import RMSNorm
from quantkit.runtime.models.decoder import Decoder, DecoderLayer
from quantkit.runtime.models.spec import DecoderSpec
from quantkit.runtime.weights import Weights


def build_decoder(spec: DecoderSpec, weights: Weights) -> Decoder:
    """Read every tensor, layer by layer; quantized linears stay in their stored form."""
    base = weights.base
    embedding = Embedding(
        weights.tensor(f"{base}embed_tokens.weight", (spec.vocab_size, spec.hidden_size)),
        spec.embedding_multiplier,
    )
    layers = [_layer(spec, weights, number) for number in range(len(spec.layers))]
    norm = _norm(spec, weights, f"{base}norm", spec.hidden_size)
    head: nn.Module
    if spec.is_head_tied:
        weights.skip_tied_head()
        head = Linear(embedding.weight)
    else:
        head = weights.linear(weights.head, spec.vocab_size, spec.hidden_size, has_bias=False)
    weights.finish()
    release_freed_memory()
    return Decoder(embedding, layers, norm, head, logit_softcap=spec.logit_softcap)


def _layer(spec: DecoderSpec, weights: Weights, number: int) -> DecoderLayer:
    name = f"{weights.base}layers.{number}"
    size = spec.hidden_size
    release_freed_memory()  # of the layer before
    sandwich = spec.has_sandwich_norms
    before_mlp = "pre_feedforward_layernorm" if sandwich else "post_attention_layernorm"
    return DecoderLayer(
        _attention(spec, weights, number),
        _mlp(spec, weights, f"{name}.mlp"),
        before_attention=_norm(spec, weights, f"{name}.input_layernorm", size),
        after_attention=_norm(spec, weights, f"{name}.post_attention_layernorm", size) if sandwich else None,
        before_mlp=_norm(spec, weights, f"{name}.{before_mlp}", size),
        after_mlp=_norm(spec, weights, f"{name}.post_feedforward_layernorm", size) if sandwich else None,
    )


def _attention(spec: DecoderSpec, weights: Weights, number: int) -> Attention:
    name = f"{weights.base}layers.{number}.self_attn"
    size = spec.hidden_size
    q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    return Attention(
        weights.linear(f"{name}.q_proj", q_size, size, has_bias=spec.has_qkv_bias),
        weights.linear(f"{name}.k_proj", kv_size, size, has_bias=spec.has_qkv_bias),
        weights.linear(f"{name}.v_proj", kv_size, size, has_bias=spec.has_qkv_bias),
        weights.linear(f"{name}.o_proj", size, q_size, has_bias=spec.has_o_bias),
        q_norm=_norm(spec, weights, f"{name}.q_norm", spec.head_dim) if spec.has_qk_norm else None,
        k_norm=_norm(spec, weights, f"{name}.k_norm", spec.head_dim) if spec.has_qk_norm else None,
        layer=number,
        head_dim=spec.head_dim,
        scale=spec.attention_scale,
        rope=spec.layers[number].rope,
        window=spec.layers[number].window,
    )


def _mlp(spec: DecoderSpec, weights: Weights, name: str) -> GatedMLP:
    inner, size, bias = spec.intermediate_size, spec.hidden_size, spec.has_mlp_bias
    return GatedMLP(
        weights.linear(f"{name}.gate_proj", inner, size, has_bias=bias),
        weights.linear(f"{name}.up_proj", inner, size, has_bias=bias),
        weights.linear(f"{name}.down_proj", size, inner, has_bias=bias),
        spec.activation,
    )


def _norm(spec: DecoderSpec, weights: Weights, name: str, size: int) -> RMSNorm:
    return RMSNorm(weights.tensor(f"{name}.weight", (size,)), spec.norm_eps, plus_one=spec.norm_plus_one)
