"""From a checkpoint folder to a model that runs."""

from dataclasses import replace
from pathlib import Path

import torch

from quantkit.arch.names import place_of
from quantkit.errors import GenerationError, SourceError
from quantkit.formats.checkpoint import Checkpoint, open_checkpoint
from quantkit.formats.kv_cache import read_kv_cache
from quantkit.formats.quantization_config import QuantizedModules, read_quantization
from quantkit.runtime.device_checkpoint import DeviceCheckpoint
from quantkit.runtime.kv_pool import KVFormat, choose_format
from quantkit.runtime.layers.build_experts import check_experts
from quantkit.runtime.layers.gpu_linear import family_of
from quantkit.runtime.model import Model
from quantkit.runtime.models.build import build_decoder
from quantkit.runtime.models.families import read_spec
from quantkit.runtime.models.spec import DecoderSpec
from quantkit.runtime.settings import KVCacheDtypeName
from quantkit.runtime.target import Target
from quantkit.runtime.weights import Weights

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
CPU = torch.device("cpu")
MOST_POSITIONS = 1 << 24  # that float32, in which their angles are computed, tells apart


def load_model(
    source: Path | Checkpoint,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device = CPU,
    kv_cache_dtype: KVCacheDtypeName = "auto",
    batch_invariant: bool = False,
    max_model_len: int | None = None,
) -> Model:
    """Load a model, 16-bit or quantized, layer by layer; it stays in its stored form.

    dtype: of activations, norms and 16-bit weights; None: the one config.json names. batch_invariant: what else is in
    a batch does not change a sequence's results, at the price of speed. max_model_len: the longest context that it is
    ever run with; None: the longest that it was made for. Peak memory: on a CPU the model as stored plus
    one tensor (INT4 in bf16: twice its codes, since decode and prefill want different layouts); on a GPU plus one
    layer as stored and one on its way, and 128 MB of the host's.
    Raises UnsupportedModelError for an architecture or feature that the runtime does not have; GenerationError for a
    context that the model was not made for; SchemeError for a number
    format that the device has no kernel for; SourceError for tensors that are missing, damaged, or do not fit the
    config, or a number format that nothing runs.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    spec, quantized = read_spec(checkpoint), read_quantization(checkpoint.config)
    spec = limited(spec, max_model_len)
    target = Target(device, dtype or model_dtype(checkpoint), batch_invariant)
    kv = kv_format(checkpoint, spec, target, kv_cache_dtype)
    if target.has_kernels:
        check_kernels(checkpoint, quantized, target)
    if device.type == "cpu":
        return Model(build_decoder(spec, Weights(checkpoint, quantized, target)), spec, target, kv)
    on_device = DeviceCheckpoint(checkpoint, device)
    try:
        return Model(build_decoder(spec, Weights(on_device, quantized, target)), spec, target, kv)
    finally:
        on_device.close()


def limited(spec: DecoderSpec, max_model_len: int | None) -> DecoderSpec:
    """A model that is never run with longer contexts; None: than it was made for.

    Raises GenerationError if it was not made for these, or nothing could be.
    """
    if max_model_len is None:
        max_model_len = spec.max_positions
    if not 1 <= max_model_len <= spec.max_positions:
        raise GenerationError(
            f"a context of {max_model_len} tokens for a model that was made for at most {spec.max_positions}",
            fix=f"ask for 1 to {spec.max_positions}",
        )
    if max_model_len > MOST_POSITIONS:
        raise GenerationError(
            f"a context of {max_model_len} tokens, and positions are told apart up to {MOST_POSITIONS}",
            fix=f"give max_model_len {MOST_POSITIONS} or less, or correct max_position_embeddings in config.json",
        )
    return replace(spec, max_positions=max_model_len)


def kv_format(checkpoint: Checkpoint, spec: DecoderSpec, target: Target, asked: KVCacheDtypeName) -> KVFormat:
    """How keys and values of a checkpoint's model are stored."""
    return choose_format(
        read_kv_cache(checkpoint),
        asked,
        num_layers=len(spec.layers),
        num_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        dtype=target.dtype,
    )


def check_kernels(checkpoint: Checkpoint, quantized: QuantizedModules, target: Target) -> None:
    """Before anything is read: raise SchemeError for the first linear that the GPU has no kernel for."""
    seen = set()
    for name in checkpoint.tensors:
        module = name.removesuffix(".weight_scale")
        scheme = quantized.scheme_of(module) if module != name else None
        place = place_of(module)
        is_expert = place is not None and place.expert is not None
        if scheme is not None and (scheme, is_expert) not in seen:
            seen.add((scheme, is_expert))
            if is_expert:
                check_experts(module, scheme, target)
            else:
                family_of(module, scheme, target)


def model_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that config.json names (`dtype`, or `torch_dtype` as it was called)."""
    configs = (checkpoint.text_config, checkpoint.config)
    names = [
        config[key] for config in configs for key in ("dtype", "torch_dtype") if config.get(key) is not None
    ]
    if not names or not isinstance(names[0], str) or names[0] not in DTYPES:
        found = f"dtype {names[0]!r}" if names else "no dtype"
        raise SourceError(
            f"{checkpoint.path / 'config.json'}: {found}, needed to run the model",
            fix=f"add dtype to config.json: one of {', '.join(DTYPES)}",
        )
    return DTYPES[names[0]]
