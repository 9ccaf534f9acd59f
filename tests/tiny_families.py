"""A tiny random model of every family in the tables, with norms and biases that matter, as transformers saves it."""

from pathlib import Path
from typing import Any

import torch
import transformers

SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
SPECIAL: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "phi3": {"hidden_size": 64},  # its head_dim is hidden_size / heads
    "mixtral": {"num_local_experts": 4},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "hidden_size": 64},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 96,
    },
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "mlp_only_layers": [0],
    },
}
TEXT_FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2", "smollm3", "phi3"),
    *("mixtral", "olmoe", "qwen3_moe", "qwen2_moe"),
)


def tiny_family(model_type: str, **settings: Any) -> transformers.PreTrainedModel:
    """A float32 model; weights are large enough that every part of it changes the logits."""
    config = transformers.AutoConfig.for_model(
        model_type, **{**SIZES, **SPECIAL.get(model_type, {}), **settings}
    )
    torch.manual_seed(sum(model_type.encode()))
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    for parameter in model.parameters():
        std = 0.5 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
        torch.nn.init.normal_(parameter, mean=0.3 if parameter.ndim == 1 else 0.0, std=std)
    return model


def save_family(model_type: str, folder: Path, **settings: Any) -> Path:
    """The folder that transformers writes of it: one tensor per expert."""
    transformers.utils.logging.disable_progress_bar()
    tiny_family(model_type, **settings).save_pretrained(folder)
    return folder


def logits_of(folder: Path) -> torch.Tensor:
    """What transformers computes in float32 from 24 random tokens, float64 [T, V]."""
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(3, 96, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(ids).logits[0].double()
