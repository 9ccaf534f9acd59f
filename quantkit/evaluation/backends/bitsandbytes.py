"""Baselines made from the original while it is loaded: NF4 and LLM.int8 of bitsandbytes, within transformers.

bnb:nf4    codes of 4 bits, a float32 scale for 64 weights: 4.5 bits; computes in the dtype asked for
bnb:int8   codes of 8 bits, a float32 scale for each output; inputs in float16, those beyond 6.0 apart, 8-bit else
"""

import logging
import math
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import BitsAndBytesConfig

from quantkit.arch import place_of
from quantkit.arch.skeleton import build_language_model
from quantkit.errors import EvaluationError
from quantkit.evaluation.backends.transformers import TransformersModel, load_transformers
from quantkit.evaluation.serving import Serving
from quantkit.evaluation.size import Size
from quantkit.evaluation.subjects import Subject
from quantkit.formats.checkpoint import Checkpoint

UNQUANTIZED = {"16-bit", "32-bit", "GGUF"}
NF4_BLOCK = 64  # weights that share a scale
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "bnb:nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "bnb:int8": {"load_in_8bit": True},
}


def bitsandbytes_subject(name: str, original: Subject) -> Subject:
    """The candidate that bitsandbytes makes from the original. Raises EvaluationError for one that it does not make."""
    if name not in SETTINGS:
        raise EvaluationError(f"{name}: no such format of bitsandbytes", fix=f"use {' or '.join(SETTINGS)}")
    if original.kind not in UNQUANTIZED:
        raise EvaluationError(
            f"{name} is made from the reference, and {original.name} is quantized itself ({original.kind})",
            fix="give the 16-bit original as the reference",
        )
    note = f"{name}: made from {original.name} while it is loaded"
    if name == "bnb:int8":
        note += "; LLM.int8 casts its inputs to float16"
    size = _size(name, original.checkpoint, original.size)
    return original._replace(name=name, size=size, backend="bitsandbytes", kind=name, notes=(note,))


def load_bitsandbytes(subject: Subject, serving: Serving) -> TransformersModel:
    """Quantize the original while it is loaded. Raises SourceError."""
    # it warns once for each product that inputs are cast; a note says it for all
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    config = BitsAndBytesConfig(**SETTINGS[subject.kind], bnb_4bit_compute_dtype=serving.target.dtype)
    return load_transformers(subject, serving, quantization_config=config)


def _size(name: str, checkpoint: Checkpoint, original: Size) -> Size:
    """What it would take on disk: bitsandbytes quantizes every linear of the layers; the rest stays as it is."""
    model = build_language_model(checkpoint)
    linears = [
        module for path, module in model.named_modules() if type(module) is nn.Linear and place_of(path)
    ]
    num_quantized = sum(linear.weight.numel() for linear in linears)
    codes = sum(_num_bytes(name, linear) for linear in linears)
    others = round((original.num_weights - num_quantized) * original.bits_per_weight / 8)
    linear_bytes = codes + others
    return Size(original.num_weights, linear_bytes, original.bytes - original.linear_bytes + linear_bytes)


def _num_bytes(name: str, linear: nn.Linear) -> int:
    num_weights = linear.weight.numel()
    if name == "bnb:nf4":
        return num_weights // 2 + 4 * math.ceil(num_weights / NF4_BLOCK)
    return num_weights + 4 * linear.out_features
