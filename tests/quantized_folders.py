"""Small quantized Llama folders, written through the format functions alone: no recipe, no algorithm."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from quantkit.formats.compressed_tensors import StoredLinear, encode_linear
from quantkit.formats.kv_cache import StoredKV, kv_tensors, write_kv_sidecar
from quantkit.formats.quantization_config import write_quantization
from quantkit.schemes import KVScheme, QParams, Scheme
from quantkit.schemes.labels import kv_label, scheme_label
from quantkit.schemes.tiles import dequantize_weight, minmax_qparams, quantize_weight

NUM_KV_HEADS, NUM_LAYERS = 2, 2
CONFIG: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": NUM_KV_HEADS,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "hidden_act": "silu",
    "vocab_size": 96,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
LINEARS: Mapping[str, tuple[int, int]] = {
    f"model.layers.{layer}.{name}": shape
    for layer in range(NUM_LAYERS)
    for name, shape in {
        "self_attn.q_proj": (128, 128),
        "self_attn.k_proj": (64, 128),
        "self_attn.v_proj": (64, 128),
        "self_attn.o_proj": (128, 128),
        "mlp.gate_proj": (256, 128),
        "mlp.up_proj": (256, 128),
        "mlp.down_proj": (128, 256),
    }.items()
}
ATTENTION = {layer: f"model.layers.{layer}.self_attn" for layer in range(NUM_LAYERS)}


class QuantizedFolder(NamedTuple):
    """dense: every tensor of the model as it was; weights: what the quantized linears stand for, float32."""

    path: Path
    dense: dict[str, Tensor]
    weights: dict[str, Tensor]


def write_quantized(
    path: Path,
    scheme: Scheme | Callable[[str], Scheme | None] | None,
    *,
    kv: KVScheme | None = None,
    scale_dtype: torch.dtype = torch.float32,
    input_scale: float = 0.05,
    with_plan: bool = True,
) -> QuantizedFolder:
    """A folder of one scheme for all linears of the layers, or of one per linear; static inputs share a scale."""
    schemes = {name: scheme(name) if callable(scheme) else scheme for name in LINEARS}
    dense = dense_tensors()
    tensors, weights = dict(dense), {}
    for name, one in schemes.items():
        if one is not None:
            linear = _quantized(tensors.pop(f"{name}.weight"), one, scale_dtype, input_scale)
            stored = encode_linear(linear, one)
            tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in stored.items()}
            weights[name] = dequantize_weight(linear.codes_NK, one.weight.granularity, linear.qparams)
    path.mkdir(parents=True, exist_ok=True)
    if kv is not None:
        tensors |= _write_kv(path, kv)
    config = {**CONFIG}
    if kv is not None or weights:
        section_kv = kv if kv is not None and kv.dtype == "fp8" else None
        config["quantization_config"] = write_quantization(schemes, section_kv, extra_ignore=["lm_head"])
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer.json").write_text("{}")
    if with_plan:
        (path / "quantkit.json").write_text(json.dumps(_plan(schemes, kv)))
    return QuantizedFolder(path, dense, weights)


def dense_tensors() -> dict[str, Tensor]:
    """Every tensor of the model before it was quantized, float32, of the sizes that make logits spread."""
    generator = torch.Generator().manual_seed(0)
    shapes = {f"{name}.weight": shape for name, shape in LINEARS.items()}
    shapes |= {"model.embed_tokens.weight": (96, 128), "lm_head.weight": (96, 128)}
    tensors = {
        name: torch.randn(shape, generator=generator) / shape[1] ** 0.5 for name, shape in shapes.items()
    }
    norms = ["model.norm"]
    norms += [f"model.layers.{layer}.{name}_layernorm" for layer in range(NUM_LAYERS) for name in NORMS]
    return tensors | {f"{name}.weight": 1 + 0.1 * torch.randn(128, generator=generator) for name in norms}


NORMS = ("input", "post_attention")


def _quantized(w_NK: Tensor, scheme: Scheme, scale_dtype: torch.dtype, input_scale: float) -> StoredLinear:
    qparams = minmax_qparams(w_NK, scheme.weight, scale_dtype)
    input_qparams = None
    if scheme.is_static:
        assert scheme.activation is not None, "static means that there is an input spec"
        zero_point = None if scheme.activation.symmetric else torch.tensor([-9], dtype=torch.int8)
        input_qparams = QParams(torch.tensor([input_scale], dtype=scale_dtype), zero_point)
    return StoredLinear(quantize_weight(w_NK, scheme.weight, qparams), qparams, input_qparams)


def _write_kv(path: Path, scheme: KVScheme) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = {"tensor": (1,), "head": (NUM_KV_HEADS, 1, 1)}.get(scheme.granularity)
    scales = {}
    if shape is not None:
        for layer in ATTENTION:
            k_scale, v_scale = 0.02 + 0.01 * torch.rand(2, *shape, generator=generator)
            scales[layer] = (k_scale.clone(), v_scale.clone())
    stored = StoredKV(scheme, scales)
    if scheme.dtype == "fp8":
        return kv_tensors(stored, ATTENTION)
    write_kv_sidecar(path, stored, ATTENTION)
    return {}


def _plan(schemes: Mapping[str, Scheme | None], kv: KVScheme | None) -> dict[str, Any]:
    return {
        "kv_cache": None if kv is None else kv_label(kv),
        "linears": {
            name: {"scheme": None if scheme is None else scheme_label(scheme), "shape": list(LINEARS[name])}
            for name, scheme in schemes.items()
        },
    }
