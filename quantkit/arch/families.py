"""The architectures known without asking transformers: the modules of one decoder layer, in order.

Names are those on disk, checked against what transformers 5.23 saves and reads. Modules of one `group` run
as one matmul in serving engines (q, k, v; gate, up; all experts of a layer), so they share one scheme.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass


class Role(enum.Enum):
    """What a tensor is for."""

    ATTENTION = "attention"
    MLP = "mlp"
    EXPERT = "expert"
    ROUTER = "router"
    HEAD = "head"
    EMBEDDING = "embedding"
    VECTOR = "norm or bias"
    OTHER = "other"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A module of a decoder layer: name below the layer ({} for an expert's number), group if it is fused."""

    name: str
    role: Role
    group: str | None = None


Family = tuple[Part, ...]


def _attention(*fused: str, group: str | None = "self_attn.qkv_proj") -> tuple[Part, ...]:
    inputs = tuple(Part(name=f"self_attn.{name}", role=Role.ATTENTION, group=group) for name in fused)
    return (*inputs, Part(name="self_attn.o_proj", role=Role.ATTENTION))


def _gated(parent: str) -> tuple[Part, ...]:
    group = f"{parent}.gate_up_proj"
    return (
        Part(name=f"{parent}.gate_proj", role=Role.MLP, group=group),
        Part(name=f"{parent}.up_proj", role=Role.MLP, group=group),
        Part(name=f"{parent}.down_proj", role=Role.MLP),
    )


def _experts(parent: str, *names: str) -> tuple[Part, ...]:
    return tuple(Part(name=f"{parent}.{{}}.{name}", role=Role.EXPERT, group=parent) for name in names)


SEPARATE_QKV = _attention("q_proj", "k_proj", "v_proj")
DENSE = _gated("mlp")
EXPERTS = (
    Part(name="mlp.gate", role=Role.ROUTER),
    *_experts("mlp.experts", "gate_proj", "up_proj", "down_proj"),
)

LLAMA = (*SEPARATE_QKV, *DENSE)
PHI3 = (
    *_attention("qkv_proj", group=None),
    Part(name="mlp.gate_up_proj", role=Role.MLP),
    Part(name="mlp.down_proj", role=Role.MLP),
)
MIXTRAL = (
    *SEPARATE_QKV,
    Part(name="block_sparse_moe.gate", role=Role.ROUTER),
    *_experts("block_sparse_moe.experts", "w1", "w3", "w2"),
)
QWEN3_MOE = (*SEPARATE_QKV, *DENSE, *EXPERTS)
QWEN2_MOE = (
    *QWEN3_MOE,
    *_gated("mlp.shared_expert"),
    Part(name="mlp.shared_expert_gate", role=Role.ROUTER),
)

FAMILIES: Mapping[str, Family] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen2_vl": LLAMA,
    "qwen2_vl_text": LLAMA,
    "qwen2_5_vl": LLAMA,
    "qwen2_5_vl_text": LLAMA,
    "qwen3": LLAMA,
    "qwen3_vl_text": LLAMA,
    "gemma2": LLAMA,
    "gemma3_text": LLAMA,
    "olmo2": LLAMA,
    "smollm3": LLAMA,
    "phi3": PHI3,
    "mixtral": MIXTRAL,
    "olmoe": QWEN3_MOE,
    "qwen3_moe": QWEN3_MOE,
    "qwen2_moe": QWEN2_MOE,
}
