"""From a checkpoint folder to a model that runs."""

from pathlib import Path

import torch

from quantkit.errors import SourceError
from quantkit.formats.checkpoint import Checkpoint, open_checkpoint
from quantkit.formats.kv_cache import read_kv_cache
from quantkit.formats.quantization_config import read_quantization
from quantkit.runtime.model import Model
from quantkit.runtime.models.build import build_decoder
from quantkit.runtime.models.families import read_spec
from quantkit.runtime.weights import Weights

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def load_model(source: Path | Checkpoint, *, dtype: torch.dtype | None = None) -> Model:
    """Load a model, 16-bit or quantized, tensor by tensor; it stays in its stored form.

    dtype: of activations, norms and 16-bit weights; None: the one config.json names. Peak memory: the model as
    stored, plus one tensor (INT4 in bf16: twice its codes, since decode and prefill want different layouts).
    Raises UnsupportedModelError for an architecture or feature that the runtime does not have; SourceError for
    tensors that are missing, damaged, or do not fit the config, or a number format that nothing runs.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    spec = read_spec(checkpoint)
    dtype = dtype or model_dtype(checkpoint)
    kv = read_kv_cache(checkpoint)
    weights = Weights(checkpoint, read_quantization(checkpoint.config), dtype)
    return Model(build_decoder(spec, weights), spec, dtype, kv)


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
