"""GGUF files, converted to a bf16 checkpoint folder through transformers' reader.

The whole model is held in memory while converting, about 4 bytes per parameter. What that reader would drop
without a word (rope scaling, tensors it has no place for) is refused.
"""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from quantkit.errors import OutputError, SourceError, first_line
from quantkit.formats.gguf_header import GgufArray, GgufHeader, read_gguf_header
from quantkit.formats.quiet_transformers import quiet_transformers

CARRIED = {
    "context_length": ("max_position_embeddings",),
    "block_count": ("num_hidden_layers",),
    "embedding_length": ("hidden_size",),
    "feed_forward_length": ("intermediate_size",),
    "vocab_size": ("vocab_size",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.layer_norm_epsilon": ("layer_norm_epsilon", "layer_norm_eps", "norm_eps", "norm_epsilon"),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
}


REQUIRED = ("context_length", "embedding_length", "block_count", "attention.head_count")
NEUTRAL = {
    "rope.scaling.type": "none",
    "rope.scaling.factor": 1.0,
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.causal": True,
}
HEAD_DIMS = {"rope.dimension_count", "attention.key_length", "attention.value_length"}
WITHOUT_EFFECT = {"tensor_data_layout"}


def convert_gguf(file: Path, folder: Path) -> None:
    """Write config, bf16 safetensors, tokenizer and generation config of a GGUF file into an empty folder.

    Raises SourceError naming the file if it is damaged, of an architecture transformers cannot read from
    GGUF, or has settings or tensors the conversion would lose; OutputError if the folder cannot be written.
    """
    header = read_gguf_header(file)
    _check_convertible(file, header)
    with quiet_transformers():
        config = _corrected(file, _read(file, transformers.AutoConfig), header)
        model, loading = _read(
            file,
            transformers.AutoModelForCausalLM,
            config=config,
            dtype=torch.bfloat16,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # _check_complete names them
        )
        _check_complete(file, model, loading, header)
        tokenizer = _read(file, transformers.AutoTokenizer)
        _write(model, tokenizer, header, folder)


def _check_convertible(file: Path, header: GgufHeader) -> None:
    architecture = header.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise _lossy(f"{file} does not name its architecture")
    if header.metadata.get("split.count", 1) != 1:
        raise SourceError(
            f"{file} is one part of several", fix="merge the parts with llama-gguf-split --merge"
        )
    for key in (f"{architecture}.{name}" for name in REQUIRED):
        if key not in header.metadata:  # the reader would put in a default
            raise _lossy(f"{file} does not say {key}")
        value = header.metadata[key]
        if not isinstance(value, GgufArray) and (type(value) is not int or value < 1):
            raise _lossy(f"{file} says {key} {value!r}, not a positive number")
    num_layers = header.metadata[f"{architecture}.block_count"]
    if isinstance(num_layers, int) and num_layers > len(header.tensors):  # every layer has tensors
        raise _lossy(f"{file} counts {num_layers} layers, but holds {len(header.tensors)} tensors")
    base = header.metadata.get(f"{architecture}.rope.freq_base", 1.0)
    if type(base) not in (int, float) or not 0 < base < float("inf"):
        raise _lossy(f"{file} says {architecture}.rope.freq_base {base!r}, not a positive number")
    if "tokenizer.ggml.tokens" not in header.metadata:
        raise _lossy(f"{file} has no vocabulary")
    scaling = next((tensor.name for tensor in header.tensors if tensor.name.startswith("rope_")), None)
    if scaling:
        raise _lossy(f"{file}: {scaling} scales its rope; the conversion loses that")


def _lossy(problem: str) -> SourceError:
    return SourceError(problem, fix="use the safetensors version of this model")


def _read(file: Path, auto_class: Any, **options: Any) -> Any:
    try:
        return auto_class.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True, **options)
    except Exception as error:
        raise _lossy(
            f"{file} cannot be read by transformers {transformers.__version__} ({first_line(error)})"
        ) from error


def _corrected(file: Path, config: Any, header: GgufHeader) -> Any:
    """The config, with what the file says where the reader leaves a default; refuses what has no place."""
    settings = config.to_dict()
    prefix = f"{header.metadata['general.architecture']}."
    said = {
        key.removeprefix(prefix): value for key, value in header.metadata.items() if key.startswith(prefix)
    }
    # they go by other names in some families
    if not {"hidden_size", "num_attention_heads"} <= settings.keys():
        raise _lossy(f"{file}: the conversion does not know how a config of {config.model_type} is written")
    head_dim = said.get("attention.key_length", settings["hidden_size"] // settings["num_attention_heads"])
    if "head_dim" in settings:
        settings["head_dim"] = head_dim
    for name, value in said.items():
        target = next((target for target in CARRIED.get(name, ()) if target in settings), None)
        if isinstance(value, GgufArray):
            raise _lossy(f"{file}: {prefix}{name} differs by layer; the conversion loses that")
        if target:
            settings[target] = value
        elif not (
            name in WITHOUT_EFFECT
            or NEUTRAL.get(name) == value
            or (name in HEAD_DIMS and value == head_dim)
            or _set_rope_base(settings, name, value)
        ):
            raise _lossy(f"{file}: {prefix}{name} is {value!r}; the conversion loses that")
    return type(config).from_dict(settings)


def _set_rope_base(settings: dict[str, Any], name: str, value: Any) -> bool:
    """Put a rope base where the config has it; False if this is none or it has none."""
    rope = settings.get("rope_parameters") or {}
    if name not in _ROPE_LAYERS:
        return False
    if name == "rope.freq_base" and "rope_theta" in rope:
        rope["rope_theta"] = value
        return True
    layers = rope.get(_ROPE_LAYERS[name])
    if not isinstance(layers, dict):
        return False
    layers["rope_theta"] = value
    return True


_ROPE_LAYERS = {"rope.freq_base": "full_attention", "rope.freq_base_swa": "sliding_attention"}


def _check_complete(file: Path, model: Any, loading: dict[str, Any], header: GgufHeader) -> None:
    """Every parameter came from the file, and every value of the file went into a parameter."""
    name = type(model).__name__
    if loading["mismatched_keys"]:
        key, there, wanted = min(loading["mismatched_keys"])
        raise _lossy(f"{file} has {key} as {list(there)}, not {list(wanted)}")
    if loading["missing_keys"]:
        raise _lossy(f"{file} lacks {min(loading['missing_keys'])} of {name}")
    taken = sum(parameter.numel() for parameter in model.parameters())
    there = sum(tensor.num_elements for tensor in header.tensors)
    if taken != there:
        raise _lossy(f"{file} holds {there} weights, but {name} has {taken}")


def _write(model: Any, tokenizer: Any, header: GgufHeader, folder: Path) -> None:
    settings = model.config.to_dict()
    for key in ("quantization_config", "_model_name_or_path", "_name_or_path"):
        settings.pop(key, None)
    with torch.device("meta"):
        plain = type(model)(type(model.config).from_dict(settings)).to(torch.bfloat16)
    plain.load_state_dict(model.state_dict(), assign=True)  # as loaded from GGUF, it refuses to be saved
    plain.tie_weights()
    plain.generation_config = _generation_config(model.config, header)
    try:
        plain.save_pretrained(folder, max_shard_size="4GB")
        tokenizer.save_pretrained(folder)
    except SafetensorError as error:
        raise OutputError(
            f"{folder}: cannot write the converted weights ({error})",
            fix="free some space, or set QUANTKIT_CACHE to a folder with more",
        ) from error
    _clean_tokenizer_config(folder / "tokenizer_config.json")


def _generation_config(config: Any, header: GgufHeader) -> Any:
    """Stops at the end of a turn too, where the file names that token apart from the end of the text."""
    named = [header.metadata.get(f"tokenizer.ggml.{key}") for key in ("eos_token_id", "eot_token_id")]
    ends = list(dict.fromkeys(end for end in named if isinstance(end, int)))
    return transformers.GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=ends[0] if len(ends) == 1 else ends or None,
        pad_token_id=config.pad_token_id,
    )


def _clean_tokenizer_config(file: Path) -> None:
    """Drop notes on where it was loaded from; name a class that every version of transformers knows."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    for key in ("is_local", "local_files_only", "name_or_path"):
        settings.pop(key, None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(
        json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
    )
