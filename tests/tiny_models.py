"""Tiny random models of the runtime's families, saved by transformers, and their quantized versions."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OlmoeConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from quantkit.formats.checkpoint import open_checkpoint
from quantkit.formats.compressed_tensors import StoredLinear, encode_linear
from quantkit.formats.quantization_config import write_quantization
from quantkit.schemes import KVScheme, PerTensor, QParams, Scheme
from quantkit.schemes.tiles import minmax_qparams, quantize_weight

VOCAB = 97
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
GEMMA_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
GEMMA_ROPE = {
    "full_attention": {**LINEAR, "rope_theta": 1000000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.05, 1.1, 1.2, 1.3, 1.4],
    "long_factor": [1.1, 1.5, 2.5, 4.0, 8.0, 16.0],
    "original_max_position_embeddings": 8,
}
SPECIAL = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}  # where defaults are outside of the vocabulary

CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**COMMON),
    "llama-tied-biased-llama3": LlamaConfig(
        **COMMON, tie_word_embeddings=True, attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3
    ),
    "llama-yarn": LlamaConfig(**COMMON, rope_parameters=YARN),
    "llama-yarn-mscale": LlamaConfig(
        **COMMON,
        rope_parameters={**YARN, "mscale": 1.5, "mscale_all_dim": 0.7, "truncate": False, "beta_fast": 16.0},
    ),
    "llama-linear": LlamaConfig(**COMMON, rope_parameters=LINEAR),
    "llama-one-kv-head": LlamaConfig(**{**COMMON, "num_key_value_heads": 1}),
    "llama-wide": LlamaConfig(**{**COMMON, "hidden_size": 128, "intermediate_size": 256}),
    "mistral-window": MistralConfig(**COMMON, sliding_window=7),
    "mistral-head-dim": MistralConfig(**COMMON, sliding_window=None, head_dim=32),
    "qwen2-tied": Qwen2Config(**COMMON, tie_word_embeddings=True),
    "qwen2-window": Qwen2Config(**COMMON, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": Qwen3Config(**COMMON, head_dim=32, attention_bias=True),
    "gemma3": Gemma3TextConfig(
        **COMMON,
        head_dim=32,
        sliding_window=6,
        layer_types=GEMMA_LAYERS,
        query_pre_attn_scalar=48,
        final_logit_softcapping=3.0,
        rope_parameters=GEMMA_ROPE,
    ),
    "gemma2": Gemma2Config(
        **COMMON,
        head_dim=32,
        sliding_window=6,
        query_pre_attn_scalar=48,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "phi3": Phi3Config(**COMMON, **SPECIAL, sliding_window=7),
    "phi3-partial": Phi3Config(
        **COMMON,
        **SPECIAL,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75},
    ),
    "phi3-long": Phi3Config(**COMMON, **SPECIAL, rope_parameters=LONG, original_max_position_embeddings=8),
    "olmo2": Olmo2Config(**COMMON, **SPECIAL),
    "smollm3": SmolLM3Config(**{**COMMON, "num_hidden_layers": 4}, **SPECIAL),
    "smollm3-window": SmolLM3Config(
        **COMMON, **SPECIAL, no_rope_layers=[1, 0, 1], use_sliding_window=True, sliding_window=5
    ),
    "mixtral": MixtralConfig(**COMMON, num_local_experts=6, num_experts_per_tok=2, sliding_window=7),
    "qwen2-moe": Qwen2MoeConfig(
        **COMMON,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=64,
        num_experts=8,
        num_experts_per_tok=3,
        mlp_only_layers=[1],
    ),
    "qwen3-moe": Qwen3MoeConfig(
        **COMMON,
        head_dim=32,
        moe_intermediate_size=32,
        num_experts=8,
        num_experts_per_tok=3,
        norm_topk_prob=True,
    ),
    "qwen3-moe-mixed": Qwen3MoeConfig(
        **{**COMMON, "num_hidden_layers": 4},
        head_dim=32,
        moe_intermediate_size=32,
        num_experts=8,
        num_experts_per_tok=3,
        decoder_sparse_step=2,
        mlp_only_layers=[3],
    ),
    "olmoe": OlmoeConfig(**COMMON, **SPECIAL, num_experts=8, num_experts_per_tok=3),
}


def save_tiny(
    name: str, folder: Path, *, dtype: torch.dtype = torch.float32, shard_size: str = "1GB"
) -> Path:
    """Write a random model of CONFIGS, weights large enough that every part of it matters."""
    torch.manual_seed(sum(name.encode()))
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).to(dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 0.5)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return folder


def reference_logits(folder: Path, token_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What transformers computes, float32 [T, V]."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        return model(token_ids[None]).logits[0].float()


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    """Random token ids."""
    return torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(seed))


def round_to_nearest(w_NK: torch.Tensor, scheme: Scheme, input_scale: float = 0.05) -> StoredLinear:
    """A weight on min-max scales; static input scales are a constant."""
    qparams = minmax_qparams(w_NK, scheme.weight, torch.bfloat16)
    input_qparams = None
    if scheme.activation is not None and isinstance(scheme.activation.granularity, PerTensor):
        zero_point = None if scheme.activation.symmetric else torch.tensor([3], dtype=torch.int8)
        input_qparams = QParams(torch.tensor([input_scale], dtype=torch.bfloat16), zero_point)
    return StoredLinear(quantize_weight(w_NK, scheme.weight, qparams), qparams, input_qparams)


def quantize_tiny(source: Path, folder: Path, scheme: Scheme | None, kv: KVScheme | None = None) -> Path:
    """Every linear of a tiny model's layers on `scheme`, FP8 KV scales of a constant, in compressed-tensors."""
    checkpoint = open_checkpoint(source)
    tensors: dict[str, torch.Tensor] = {}
    schemes: dict[str, Scheme | None] = {"lm_head": None}
    for name in checkpoint.tensors:
        module = name.removesuffix(".weight")
        if scheme is None or not module.endswith("_proj"):
            tensors[name] = checkpoint.read(name)
            schemes |= {module: None} if module.endswith(("_proj", ".gate")) else {}
            continue
        stored = round_to_nearest(checkpoint.read(name).float(), scheme)
        tensors |= {f"{module}.{suffix}": part for suffix, part in encode_linear(stored, scheme).items()}
        schemes[module] = scheme
    if kv is not None:
        shape = (1,) if kv.granularity == "tensor" else (checkpoint.config["num_key_value_heads"], 1, 1)
        for layer in range(checkpoint.config["num_hidden_layers"]):
            for part in "kv":
                scale = torch.full(shape, 0.01) + 0.003 * layer
                tensors[f"model.layers.{layer}.self_attn.{part}_scale"] = scale.bfloat16()
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = {**checkpoint.config, "quantization_config": write_quantization(schemes, kv)}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
