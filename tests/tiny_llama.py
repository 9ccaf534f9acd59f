"""A Llama of two tiny layers with a real tokenizer, written in code: a checkpoint that the runtime can run."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 320
HIDDEN, INNER, LAYERS, HEADS, KV_HEADS = 32, 64, 2, 4, 2
TEXT = "The quick brown fox jumps over the lazy dog; why would a dog (or 3 dogs) mind?\n\n" * 4

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dtype": "bfloat16",
    "eos_token_id": 0,
    "head_dim": HIDDEN // HEADS,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": INNER,
    "max_position_embeddings": 128,
    "mlp_bias": False,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KV_HEADS,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": VOCAB_SIZE,
}


def tiny_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights, bfloat16, large enough for predictions that are not uniform."""
    shapes = {"model.embed_tokens.weight": (VOCAB_SIZE, HIDDEN), "lm_head.weight": (VOCAB_SIZE, HIDDEN)}
    for layer in range(LAYERS):
        for name, rows, cols in (
            ("self_attn.q_proj", HIDDEN, HIDDEN),
            ("self_attn.k_proj", HIDDEN // 2, HIDDEN),
            ("self_attn.v_proj", HIDDEN // 2, HIDDEN),
            ("self_attn.o_proj", HIDDEN, HIDDEN),
            ("mlp.gate_proj", INNER, HIDDEN),
            ("mlp.up_proj", INNER, HIDDEN),
            ("mlp.down_proj", HIDDEN, INNER),
        ):
            shapes[f"model.layers.{layer}.{name}.weight"] = (rows, cols)
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
    norms = [
        f"model.layers.{layer}.{kind}_layernorm"
        for layer in range(LAYERS)
        for kind in ("input", "post_attention")
    ]
    tensors |= {f"{name}.weight": torch.ones(HIDDEN) for name in (*norms, "model.norm")}
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


def byte_level_tokenizer(vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """A byte-level BPE tokenizer trained on a few sentences."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def write_tokenizer(folder: Path, vocab_size: int = VOCAB_SIZE) -> None:
    """tokenizer.json and tokenizer_config.json."""
    byte_level_tokenizer(vocab_size).save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_tiny_llama(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **config: object) -> Path:
    """The whole folder; config: keys that differ from CONFIG."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors or tiny_tensors(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    write_tokenizer(folder)
    return folder


def write_tiny_pair(root: Path) -> Path:
    """Folders `original` and `moved`, whose weights are a little off, and a text: what an evaluation needs."""
    write_tiny_llama(root / "original")
    generator = torch.Generator().manual_seed(1)
    moved = {
        name: tensor + 0.02 * torch.randn(tensor.shape, generator=generator).bfloat16()
        for name, tensor in tiny_tensors().items()
    }
    write_tiny_llama(root / "moved", moved)
    (root / "text.txt").write_text("The quick brown fox jumps over the lazy dog. Why?\n\n" * 30)
    return root
