"""The KV cache's part of a checkpoint: its scheme and its stored scales.

FP8 is in the main files, as compressed-tensors defines it: `kv_cache_scheme` in config.json, and per
attention module `<module>.k_scale` and `.v_scale`, [1] per tensor or [H, 1, 1] per head. What config.json cannot
say, or vLLM refuses in it, is in a file of its own, `quantkit_kv.safetensors`, and then config.json has no
`kv_cache_scheme`: metadata {"dtype": "int8" | "fp8", "granularity": "tensor" | "head" | "token", "kept_layers":
"[0, 29]"}, the last only where some layers stay in 16 bits. INT8 scales per head are in it too, float32 [H, 1, 1] under
the names above; FP8 scales stay in the main files, where a loader that is told to use FP8 finds them.

Knows nothing of how a cache is laid out in memory. H: number of KV heads.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.errors import SourceError
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.quantization_config import read_quantization
from quantkit.formats.safetensors_file import (
    TensorInfo,
    read_header,
    read_metadata,
    read_tensor,
    write_safetensors,
)
from quantkit.schemes import KVScheme
from quantkit.schemes.support import check_kv_scheme

SIDECAR_NAME = "quantkit_kv.safetensors"
_SCALE = re.compile(r"(?P<module>(?:.*\.)?(?:layers|h|blocks)\.(?P<layer>\d+)\..+)\.(?P<part>[kv])_scale")


class StoredKV(NamedTuple):
    """A KV scheme and its scales.

    scales: layer -> (k_scale, v_scale), float32, [1] or [H, 1, 1], those of kept layers unused; empty for `token`.
    kept_layers: layers whose cache stays in 16 bits.
    """

    scheme: KVScheme
    scales: dict[int, tuple[Tensor, Tensor]]
    kept_layers: frozenset[int] = frozenset()

    @property
    def is_in_sidecar(self) -> bool:
        """Whether config.json cannot say it."""
        return self.scheme.dtype == "int8" or bool(self.kept_layers)


def kv_layout(
    scheme: KVScheme, attention_modules: Mapping[int, str], num_kv_heads: int, dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Names, dtypes and shapes of the scales that belong in the shards; none for INT8.

    attention_modules: layer -> full name of its attention module, e.g. 0 -> "model.layers.0.self_attn".
    """
    if scheme.dtype != "fp8":
        return {}
    shape = _scale_shape(scheme, num_kv_heads)
    return {
        name: (dtype, shape)
        for _, module in sorted(attention_modules.items())
        for name in _scale_names(module)
    }


def kv_tensors(kv: StoredKV, attention_modules: Mapping[int, str]) -> dict[str, Tensor]:
    """The scales by tensor name, layer after layer, k before v; float32 as in `kv`."""
    return {
        name: scale
        for layer, pair in sorted(kv.scales.items())
        for name, scale in zip(_scale_names(attention_modules[layer]), pair, strict=True)
    }


def write_kv_sidecar(folder: Path, kv: StoredKV, attention_modules: Mapping[int, str]) -> Path:
    """Write the sidecar into a checkpoint folder: whole, or not at all. Returns its path."""
    assert kv.is_in_sidecar, "an FP8 cache of all layers is described by config.json and the shards"
    check_kv_scheme(kv.scheme)
    tensors: dict[str, Tensor] = {}
    if kv.scheme.dtype == "int8":
        tensors = {name: scale.float() for name, scale in kv_tensors(kv, attention_modules).items()}
    metadata: dict[str, str] = {"dtype": kv.scheme.dtype, "granularity": kv.scheme.granularity}
    if kv.kept_layers:
        metadata["kept_layers"] = json.dumps(sorted(kv.kept_layers))
    target = folder / SIDECAR_NAME
    write_safetensors(target, tensors, metadata=metadata)
    return target


def read_kv_cache(checkpoint: Checkpoint) -> StoredKV | None:
    """How this checkpoint wants its KV cache stored; None: 16-bit.

    Raises SourceError if config and sidecar both say something, if a layer's scale is missing, has another
    shape than the scheme gives it, or is not a finite positive number.
    """
    in_config = read_quantization(checkpoint.config).kv
    sidecar = checkpoint.path / SIDECAR_NAME
    if not sidecar.is_file():
        if in_config is None:
            return None
        return StoredKV(in_config, _read_scales(checkpoint, in_config, checkpoint.tensors))
    if in_config is not None:
        raise SourceError(
            f"{sidecar}: describes the KV cache, but config.json has a kv_cache_scheme too",
            fix=f"remove the one that is not meant: {SIDECAR_NAME}, or kv_cache_scheme in config.json",
        )
    header = read_header(sidecar)
    plan = _sidecar_plan(sidecar, checkpoint.count("num_hidden_layers"))
    tensors = header if plan.scheme.dtype == "int8" else checkpoint.tensors
    return plan._replace(scales=_read_scales(checkpoint, plan.scheme, tensors))


def _sidecar_plan(sidecar: Path, layers: int) -> StoredKV:
    """The sidecar's metadata, whose keys are all known; scales are left out."""
    metadata = read_metadata(sidecar)
    asked = metadata.get("dtype"), metadata.get("granularity")
    scheme = next((one for one in _SIDECAR_SCHEMES if (one.dtype, one.granularity) == asked), None)
    kept = _layer_numbers(metadata.get("kept_layers", "[]"), layers)
    is_known = metadata.keys() <= {"dtype", "granularity", "kept_layers"}
    if scheme is None or kept is None or not is_known or (scheme.dtype == "fp8" and not kept):
        raise SourceError(
            f"{sidecar}: metadata {metadata} is no KV scheme", fix="quantize the checkpoint again"
        )
    return StoredKV(scheme, {}, kept)


_SIDECAR_SCHEMES = (
    KVScheme(dtype="int8", granularity="head"),
    KVScheme(dtype="int8", granularity="token"),
    KVScheme(dtype="fp8", granularity="tensor"),
    KVScheme(dtype="fp8", granularity="head"),
)


def _layer_numbers(text: str, layers: int) -> frozenset[int] | None:
    """The numbers of a JSON list; None if it is none of existing layers."""
    try:
        numbers = json.loads(text)
    except json.JSONDecodeError:
        return None
    if not isinstance(numbers, list) or any(type(number) is not int for number in numbers):
        return None
    return frozenset(numbers) if all(0 <= number < layers for number in numbers) else None


def _read_scales(
    checkpoint: Checkpoint, scheme: KVScheme, tensors: Mapping[str, TensorInfo]
) -> dict[int, tuple[Tensor, Tensor]]:
    if scheme.granularity == "token":
        return {}
    found: dict[int, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        match = _SCALE.fullmatch(name)
        if match:
            found.setdefault(int(match["layer"]), {})[match["part"]] = info
    shape = _scale_shape(scheme, num_kv_heads(checkpoint))
    scales: dict[int, tuple[Tensor, Tensor]] = {}
    for layer in range(checkpoint.count("num_hidden_layers")):
        pair = found.get(layer, {})
        if len(pair) < 2:
            absent = "v_scale" if "k" in pair else "k_scale"
            raise SourceError(
                f"{checkpoint.path}: layer {layer} has no {absent} for its KV cache",
                fix="fetch or quantize the checkpoint again: its KV scales are incomplete",
            )
        scales[layer] = (_read_scale(pair["k"], shape), _read_scale(pair["v"], shape))
    return scales


def _read_scale(info: TensorInfo, shape: tuple[int, ...]) -> Tensor:
    scale = read_tensor(info)
    if scale.numel() == 1 and shape == (1,):
        scale = scale.reshape(1)  # some writers store one scale as a 0-d tensor
    if not scale.dtype.is_floating_point or tuple(scale.shape) != shape:
        raise SourceError(
            f"{info.file}: {info.name} is {scale.dtype} {list(scale.shape)}, "
            f"but its KV scheme makes it floating point {list(shape)}",
            fix="fetch or quantize the checkpoint again",
        )
    scale = scale.float()
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise SourceError(
            f"{info.file}: {info.name} holds a scale that is not a finite positive number",
            fix="fetch or quantize the checkpoint again",
        )
    return scale


def num_kv_heads(checkpoint: Checkpoint) -> int:
    """KV heads of a layer, by config.json: all attention heads where it names no smaller number."""
    grouped = checkpoint.text_config.get("num_key_value_heads") is not None
    return checkpoint.count("num_key_value_heads" if grouped else "num_attention_heads")


def _scale_shape(scheme: KVScheme, heads: int) -> tuple[int, ...]:
    return (1,) if scheme.granularity == "tensor" else (heads, 1, 1)


def _scale_names(module: str) -> tuple[str, str]:
    return f"{module}.k_scale", f"{module}.v_scale"
