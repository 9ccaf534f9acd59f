"""Checkpoints refused by name: quantized already, not a decoder, or nothing but remote code."""

from typing import Any

from quantkit.errors import UnsupportedModelError
from quantkit.formats.checkpoint import Checkpoint

GENERATIVE = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForVision2Seq", "ForImageTextToText")
DECODER_FIX = "give a decoder-only language model, such as a Llama, Qwen, Mistral or Gemma checkpoint"


def already_quantized(config: dict[str, Any]) -> str | None:
    """The method that config.json says a checkpoint is quantized with ("gptq", "mxfp4", …), or None."""
    for part in (config, config.get("text_config")):
        if not isinstance(part, dict):
            continue
        for key in ("quantization_config", "compression_config"):
            if part.get(key):
                return _method(part[key])
    return None


def _method(section: Any) -> str:
    if not isinstance(section, dict):
        return "a method that its config.json does not describe"
    if section.get("quant_method"):
        return str(section["quant_method"])
    if section.get("load_in_4bit") or section.get("load_in_8bit"):
        return "bitsandbytes"
    return "a method that its config.json does not name"


def refuse_unless_decoder(checkpoint: Checkpoint) -> None:
    """Raise UnsupportedModelError unless config.json describes a decoder-only model that generates text."""
    config = checkpoint.config
    if "_class_name" in config:
        raise _refused(checkpoint, f"{config['_class_name']} is part of a diffusion pipeline")
    if not isinstance(checkpoint.text_config.get("model_type") or config.get("model_type"), str):
        raise _refused(checkpoint, "config.json names no model_type")
    if config.get("is_encoder_decoder") or checkpoint.text_config.get("is_encoder_decoder"):
        raise _refused(checkpoint, f"{checkpoint.model_type} is an encoder-decoder")
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise _refused(checkpoint, f"config.json says architectures: {architectures!r}, not a list of names")
    if architectures and not any(name.endswith(GENERATIVE) for name in architectures):
        raise _refused(checkpoint, f"{architectures[0]} is not a model that generates text")


def _refused(checkpoint: Checkpoint, finding: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{checkpoint.path}: {finding}", fix=DECODER_FIX)
