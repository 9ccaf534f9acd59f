"""model_type to the function that reads its config, and what is refused."""

from collections.abc import Callable, Mapping

from quantkit.errors import SourceError, UnsupportedModelError
from quantkit.formats.checkpoint import Checkpoint
from quantkit.runtime.models.config import Config
from quantkit.runtime.models.gemma3 import read_gemma3
from quantkit.runtime.models.llama import read_llama
from quantkit.runtime.models.mistral import read_mistral
from quantkit.runtime.models.qwen import read_qwen2, read_qwen3
from quantkit.runtime.models.spec import DecoderSpec

FAMILIES: Mapping[str, Callable[[Config], DecoderSpec]] = {
    "gemma3_text": read_gemma3,
    "llama": read_llama,
    "mistral": read_mistral,
    "qwen2": read_qwen2,
    "qwen3": read_qwen3,
}
# Multimodal models whose language part is one of these: model_type -> family of their text_config.
MULTIMODAL: Mapping[str, str] = {"gemma3": "gemma3_text"}


def read_spec(checkpoint: Checkpoint) -> DecoderSpec:
    """The decoder that a checkpoint's config.json describes.

    Raises UnsupportedModelError, naming key and value, for a model_type or a feature that the runtime does
    not have; SourceError for a key that is missing, of the wrong type, or contradicts another.
    """
    place = str(checkpoint.path / "config.json")
    outer, inner = checkpoint.config, checkpoint.text_config
    model_type = str(outer.get("model_type"))
    if inner is not outer:
        place += ": text_config"
        model_type = MULTIMODAL.get(model_type, model_type)
        if outer.get("tie_word_embeddings") is not None:
            inner = {"tie_word_embeddings": outer["tie_word_embeddings"], **inner}
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"{checkpoint.path / 'config.json'}: the runtime has no model_type {outer.get('model_type')!r}",
            fix=f"use a model of one of these types: {', '.join(sorted({*FAMILIES, *MULTIMODAL}))}",
        )
    config = Config(inner, place)
    _check_depth(config, len(checkpoint.tensors))
    spec = FAMILIES[model_type](config)
    config.finish()
    _check(spec, place)
    return spec


def _check_depth(config: Config, num_tensors: int) -> None:
    """Before anything is made of their number: every layer has tensors."""
    num_layers = config.integer("num_hidden_layers")
    if num_layers > num_tensors:
        raise config.wrong("num_hidden_layers", num_layers, f"possible with {num_tensors} tensors")


def _check(spec: DecoderSpec, place: str) -> None:
    if spec.num_heads % spec.num_kv_heads:
        raise SourceError(
            f"{place}: {spec.num_heads} attention heads cannot share {spec.num_kv_heads} key-value heads",
            fix="fetch config.json again",
        )
    if spec.head_dim % 2:
        raise SourceError(
            f"{place}: head_dim {spec.head_dim} is odd, so it cannot be rotated",
            fix="fetch config.json again",
        )
