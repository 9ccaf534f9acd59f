"""model_type to the function that reads its config, and what is refused."""

from collections.abc import Callable, Mapping

from quantkit.errors import SourceError, UnsupportedModelError
from quantkit.formats.checkpoint import Checkpoint
from quantkit.runtime.layers.rotary import LongRope
from quantkit.runtime.models.config import Config
from quantkit.runtime.models.gemma2 import read_gemma2
from quantkit.runtime.models.gemma3 import read_gemma3
from quantkit.runtime.models.llama import read_llama
from quantkit.runtime.models.mistral import read_mistral
from quantkit.runtime.models.mixtral import read_mixtral
from quantkit.runtime.models.olmo import read_olmo2, read_olmoe
from quantkit.runtime.models.phi3 import read_phi3
from quantkit.runtime.models.qwen import read_qwen2, read_qwen3
from quantkit.runtime.models.qwen_moe import read_qwen2_moe, read_qwen3_moe
from quantkit.runtime.models.smollm3 import read_smollm3
from quantkit.runtime.models.spec import DecoderSpec

FAMILIES: Mapping[str, Callable[[Config], DecoderSpec]] = {
    "gemma2": read_gemma2,
    "gemma3_text": read_gemma3,
    "llama": read_llama,
    "mistral": read_mistral,
    "mixtral": read_mixtral,
    "olmo2": read_olmo2,
    "olmoe": read_olmoe,
    "phi3": read_phi3,
    "qwen2": read_qwen2,
    "qwen2_moe": read_qwen2_moe,
    "qwen3": read_qwen3,
    "qwen3_moe": read_qwen3_moe,
    "smollm3": read_smollm3,
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
    rotary_dim = spec.rotary_dim or spec.head_dim
    if rotary_dim % 2:
        raise SourceError(
            f"{place}: head_dim {rotary_dim} is odd, so it cannot be rotated",
            fix="fetch config.json again",
        )
    for layer in spec.layers:
        if isinstance(layer.rope, LongRope):
            _check_factors(layer.rope, rotary_dim, place)
        if layer.experts is not None and layer.experts.num_per_token > layer.experts.num_experts:
            raise SourceError(
                f"{place}: {layer.experts.num_per_token} experts for each token, but only {layer.experts.num_experts}",
                fix="fetch config.json again",
            )


def _check_factors(rope: LongRope, rotary_dim: int, place: str) -> None:
    for name, factors in (("short_factor", rope.short), ("long_factor", rope.long)):
        if len(factors) != rotary_dim // 2:
            raise SourceError(
                f"{place}: {name} has {len(factors)} numbers for {rotary_dim // 2} pairs of dimensions",
                fix="fetch config.json again",
            )
