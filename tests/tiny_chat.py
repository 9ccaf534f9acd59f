"""A tiny random model that talks: a token for each byte, a chat template, thousands of positions."""

from pathlib import Path

from transformers import AutoModelForCausalLM, LlamaConfig

from tests.byte_tokenizer import TEMPLATE, VOCAB_SIZE, byte_tokenizer
from tests.tiny_models import COMMON


def save_tiny_chat(folder: Path, *, template: str | None = TEMPLATE, max_positions: int = 4096) -> Path:
    """The model as a folder. template: None makes it a base model."""
    config = LlamaConfig(**{**COMMON, "vocab_size": VOCAB_SIZE, "max_position_embeddings": max_positions})
    config.eos_token_id = 1
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    if template is not None:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder
