"""Decoder layers of an architecture that `families` does not list, from the model transformers builds.

It is built on the meta device, so it takes no memory; code from the checkpoint is never run.
"""

import re
from contextlib import AbstractContextManager
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn

from quantkit.arch.families import Family, Part, Role
from quantkit.arch.names import place_of
from quantkit.arch.refusals import DECODER_FIX
from quantkit.errors import UnsupportedModelError, first_line
from quantkit.formats.checkpoint import Checkpoint

FUSED = (
    ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    ("qkv", ("query", "key", "value")),
    ("qkv_a_proj", ("q_a_proj", "kv_a_proj_with_mqa")),
    ("gate_up_proj", ("gate_proj", "up_proj")),
    ("w13", ("w1", "w3")),
)
_ATTENTION = re.compile(r"attn|attention")
_MLP = re.compile(r"mlp|ffn|feed_forward|\bfc[12]$|shared_experts?\b|dense_4h_to_h|dense_h_to_4h")
_ROUTER = re.compile(r"router|(?:^|\.)gate$|_gate$")
_EXPERT = re.compile(r"(?P<parent>.*\bexperts)\.\{\}\.(?:gate_proj|up_proj|down_proj|w1|w2|w3)")


def family_from_skeleton(checkpoint: Checkpoint) -> Family:
    """The parts of the layers that transformers would build for this config, in the order of its modules.

    Linears that are neither attention nor MLP by their names are not parts. Raises SourceError if config.json counts
    more layers than there are tensors, UnsupportedModelError if transformers does not know the architecture, or has no
    causal language model for it.
    """
    parts: dict[str, Part] = {}
    for name, module in _build(checkpoint, torch.device("meta")).named_modules():
        place = place_of(name)
        if place and type(module) is nn.Linear:
            part = _part(place.rest)
            if part:
                parts.setdefault(part.name, part)
    for name in checkpoint.tensors:  # on disk one per expert, in transformers one tensor for all of them
        place = place_of(name.removesuffix(".weight"))
        match = _EXPERT.fullmatch(place.rest) if place else None
        if place and match:
            parts.setdefault(place.rest, Part(name=place.rest, role=Role.EXPERT, group=match["parent"]))
    if not parts:
        raise UnsupportedModelError(
            f"{checkpoint.path}: {checkpoint.model_type} has no decoder layers that hold nn.Linear modules",
            fix=DECODER_FIX,
        )
    return tuple(parts.values())


def _part(name: str) -> Part | None:
    parent, _, leaf = name.rpartition(".")
    if _ROUTER.search(name):
        return Part(name=name, role=Role.ROUTER)
    if _ATTENTION.search(name):
        return Part(name=name, role=Role.ATTENTION, group=_group(parent, leaf))
    if _MLP.search(name):
        return Part(name=name, role=Role.MLP, group=_group(parent, leaf))
    return None


def _group(parent: str, leaf: str) -> str | None:
    return next((f"{parent}.{fused}" for fused, siblings in FUSED if leaf in siblings), None)


def build_language_model(checkpoint: Checkpoint) -> nn.Module:
    """The causal language model of transformers with its parameters on the meta device and its buffers in memory.

    Raises UnsupportedModelError if transformers does not know the architecture or refuses the config.
    """
    return _build(checkpoint, init_empty_weights(include_buffers=False))


def _build(checkpoint: Checkpoint, empty: AbstractContextManager[Any]) -> nn.Module:
    config = language_config(checkpoint)
    num_layers = getattr(config.get_text_config(), "num_hidden_layers", None)  # not every config has it
    # every layer has tensors; fewer than so many layers cost nothing, and may be transformers' default
    if type(num_layers) is int and num_layers > max(len(checkpoint.tensors), 1000):
        raise checkpoint.mismatch(
            f"config.json counts {num_layers} layers, but there are {len(checkpoint.tensors)} tensors"
        )
    try:
        with empty:
            model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # a model's constructor may refuse its config in any way
        raise UnsupportedModelError(
            f"{checkpoint.path}: transformers {transformers.__version__} cannot build a language model of "
            f"type {checkpoint.model_type} ({first_line(error)})",
            fix=DECODER_FIX,
        ) from error
    return model


def language_config(checkpoint: Checkpoint) -> Any:
    """The language model's config as transformers understands it; raises UnsupportedModelError if it does not."""
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    if checkpoint.model_type not in known:
        remote = (
            "; the checkpoint brings its own code, which is never run"
            if "auto_map" in checkpoint.config
            else ""
        )
        raise UnsupportedModelError(
            f"{checkpoint.path}: transformers {transformers.__version__} does not know "
            f"{checkpoint.model_type}{remote}",
            fix="upgrade transformers if the model is newer, or give one that transformers has built in",
        )
    settings = {key: value for key, value in checkpoint.text_config.items() if key not in _NOT_SETTINGS}
    try:
        return known[checkpoint.model_type].from_dict(settings)
    except Exception as error:  # config classes validate in their own ways
        raise UnsupportedModelError(
            f"{checkpoint.path}: transformers {transformers.__version__} does not accept this config.json of "
            f"{checkpoint.model_type} ({first_line(error)})",
            fix="fetch config.json again",
        ) from error


_NOT_SETTINGS = {"auto_map", "quantization_config", "compression_config"}
