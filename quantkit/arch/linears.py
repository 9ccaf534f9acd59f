"""Every tensor of a checkpoint by role: the linears that can be quantized, and why the rest stays 16-bit."""

import re
from dataclasses import dataclass
from typing import NamedTuple

import torch

from quantkit.arch.families import FAMILIES, Family, Part, Role
from quantkit.arch.layers import check_layers
from quantkit.arch.names import LANGUAGE_PREFIX, place_of
from quantkit.arch.refusals import refuse_unless_decoder
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.safetensors_file import DTYPE_NAMES, TensorInfo

WEIGHT_DTYPES = frozenset({torch.bfloat16, torch.float16, torch.float32, torch.float64})

_EMBEDDINGS = r"embed_tokens|embed_in|embed_positions|embeddings|word_embeddings|wte|wpe"
_OUTSIDE_LAYERS = (
    (re.compile(rf"{LANGUAGE_PREFIX}(?:{_EMBEDDINGS})"), Role.EMBEDDING),
    (re.compile(rf"{LANGUAGE_PREFIX}(?:lm_head|embed_out|output)\b"), Role.HEAD),
)
NEVER = {
    Role.EMBEDDING: "an embedding: stays 16-bit in every recipe",
    Role.HEAD: "the output head: stays 16-bit in every recipe",
    Role.ROUTER: "a router: stays 16-bit in every recipe",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearInfo:
    """One 2-D weight of the checkpoint that is a linear module of a decoder layer and can be quantized.

    name: module as on disk, e.g. "model.layers.0.mlp.down_proj". group: linears of one group share a scheme;
    a lone linear's group is its own name. shape: [N, K].
    """

    name: str
    role: Role
    layer: int
    group: str
    shape: tuple[int, int]


class Stays(NamedTuple):
    """A tensor of two or more dimensions that is never quantized, and why."""

    name: str
    role: Role
    reason: str


class Survey(NamedTuple):
    """A checkpoint by role. roles: of every tensor. linears: that can be quantized, by layer number, then in the order
    of the layer's computation. stays: every other tensor of two or more dimensions, by name.
    """

    linears: list[LinearInfo]
    stays: list[Stays]
    roles: dict[str, Role]


def complete_survey(checkpoint: Checkpoint) -> Survey:
    """As `survey`; raises SourceError if a layer, a module of a known architecture or an expert is missing."""
    if checkpoint.model_type in FAMILIES:
        refuse_unless_decoder(checkpoint)
        check_layers(checkpoint, FAMILIES[checkpoint.model_type])
    return survey(checkpoint)


def survey(checkpoint: Checkpoint) -> Survey:
    """Linears, the rest and the role of every tensor, without asking for completeness.

    Raises UnsupportedModelError if this is not a decoder-only language model or needs remote code.
    """
    parts = {part.name: (order, part) for order, part in enumerate(_family(checkpoint))}
    found: list[tuple[tuple[int, int, int], LinearInfo]] = []
    stays: list[Stays] = []
    roles: dict[str, Role] = {}
    for info in checkpoint.tensors.values():
        module = info.name.rpartition(".")[0]
        place = place_of(module)
        order, part = parts.get(place.rest if place else "", (0, None))
        roles[info.name] = role = _role(info, part)
        if role is Role.VECTOR:
            continue
        reason = _why_stays(info, part, role, checkpoint)
        if reason:
            stays.append(Stays(info.name, role, reason))
        else:
            assert place is not None and part is not None, "only a part of a layer has no reason to stay"
            group = place.prefix + part.group if part.group else module
            linear = LinearInfo(
                name=module, role=role, layer=place.layer, group=group, shape=(info.shape[0], info.shape[1])
            )
            found.append(((place.layer, -1 if place.expert is None else place.expert, order), linear))
    return Survey([linear for _, linear in sorted(found, key=lambda pair: pair[0])], stays, roles)


def _family(checkpoint: Checkpoint) -> Family:
    refuse_unless_decoder(checkpoint)
    if checkpoint.model_type in FAMILIES:
        return FAMILIES[checkpoint.model_type]
    from quantkit.arch.skeleton import family_from_skeleton  # transformers takes seconds to import

    return family_from_skeleton(checkpoint)


def _role(info: TensorInfo, part: Part | None) -> Role:
    if len(info.shape) < 2:
        return Role.VECTOR
    if part is not None:
        return part.role
    if _is_fused_experts(info):
        return Role.EXPERT
    return next((role for pattern, role in _OUTSIDE_LAYERS if pattern.match(info.name)), Role.OTHER)


def _is_fused_experts(info: TensorInfo) -> bool:
    place = place_of(info.name)
    return place is not None and len(info.shape) == 3 and "experts" in place.rest.split(".")


def _why_stays(info: TensorInfo, part: Part | None, role: Role, checkpoint: Checkpoint) -> str:
    """Why a tensor of two or more dimensions stays as it is; empty if it is a linear to quantize."""
    if role in NEVER:
        return NEVER[role]
    if part is not None:
        if not info.name.endswith(".weight") or len(info.shape) != 2:
            return "belongs to a linear but is not its 2-D weight"
        if info.dtype not in WEIGHT_DTYPES:
            return f"stored as {DTYPE_NAMES[info.dtype]}: quantized already"
        return ""
    if _is_fused_experts(info):
        return "all experts in one 3-D tensor: only a 2-D tensor per expert can be quantized"
    if place_of(info.name):
        return f"not known as a linear of the attention or MLP of {checkpoint.model_type}"
    is_multimodal = checkpoint.text_config is not checkpoint.config or "vision_config" in checkpoint.config
    return "not part of the language model" if is_multimodal else "not in a decoder layer"
