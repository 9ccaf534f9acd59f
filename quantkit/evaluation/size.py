"""Bits per weight and size of a model, from the headers of what is stored."""

import math
import re
from pathlib import Path
from typing import NamedTuple

from quantkit.arch import Role, survey
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.dequantized import stored_checkpoint

LINEAR_ROLES = frozenset({Role.ATTENTION, Role.MLP, Role.EXPERT})
_GGUF_LINEAR = re.compile(r"blk\.\d+\.(attn_(q|k|v|qkv|output)|ffn_(gate|up|down)(_exps|_shexp)?)\.weight")


class Size(NamedTuple):
    """num_weights, linear_bytes: of the linears in the decoder layers. bytes: of all tensors."""

    num_weights: int
    linear_bytes: int
    bytes: int

    @property
    def bits_per_weight(self) -> float:
        """NaN if there are no such linears."""
        return 8 * self.linear_bytes / self.num_weights if self.num_weights else math.nan


def measure_size(checkpoint: Checkpoint) -> Size:
    """Size on disk.

    bits_per_weight = bits of all stored tensors of the decoder layers' linears (codes, scales, zero points, shapes,
    but no biases) / number of their weights. It covers every linear that quantization may apply to, those that
    were left in 16 bits too; embeddings, output head and routers never count.
    """
    roles = survey(checkpoint).roles
    modules = {_module(name) for name, role in roles.items() if role in LINEAR_ROLES}
    num_weights = 0
    for name, info in checkpoint.tensors.items():
        leaf = name.rpartition(".")[2]
        if _module(name) not in modules or leaf == "bias":
            continue
        if leaf == "weight_shape":  # of packed codes
            num_weights += int(checkpoint.read(name).prod())
        elif roles[name] in LINEAR_ROLES and not leaf.startswith("weight_"):
            num_weights += math.prod(info.shape)
    linear_bytes = sum(
        info.num_bytes
        for name, info in stored_checkpoint(checkpoint).tensors.items()
        if _belongs(name, modules) and not name.endswith(".bias")
    )
    return Size(num_weights, linear_bytes, checkpoint.num_bytes)


def measure_gguf(file: Path, converted: Checkpoint) -> Size:
    """Size of a GGUF file whose tensors were converted."""
    from quantkit.formats.gguf_header import read_gguf_header

    tensors = read_gguf_header(file).tensors
    linear_bytes = sum(tensor.end - tensor.begin for tensor in tensors if _GGUF_LINEAR.fullmatch(tensor.name))
    num_bytes = sum(tensor.end - tensor.begin for tensor in tensors)
    return Size(measure_size(converted).num_weights, linear_bytes, num_bytes)


def _belongs(tensor_name: str, modules: set[str]) -> bool:
    """Whether a tensor is of one of these linears, or describes one of its tensors (`….weight.absmax`)."""
    module = _module(tensor_name)
    return module in modules or _module(module) in modules


def _module(tensor_name: str) -> str:
    return tensor_name.rpartition(".")[0]
