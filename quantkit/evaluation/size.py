"""Bits per weight and size of a checkpoint, read from its headers."""

import math
from typing import NamedTuple

from quantkit.arch import Role, survey
from quantkit.formats.checkpoint import Checkpoint

LINEAR_ROLES = frozenset({Role.ATTENTION, Role.MLP, Role.EXPERT})


class Size(NamedTuple):
    """bits_per_weight: of the linears in the decoder layers. bytes: of all tensors."""

    bits_per_weight: float
    bytes: int


def measure_size(checkpoint: Checkpoint) -> Size:
    """Size on disk.

    bits_per_weight = bits of all stored tensors of the decoder layers' linears (codes, scales, zero points, shapes,
    but no biases) / number of their weights. It covers every linear that quantization may apply to, those that
    were left in 16 bits too; embeddings, output head and routers never count. NaN if there is no such linear.
    """
    roles = survey(checkpoint).roles
    modules = {_module(name) for name, role in roles.items() if role in LINEAR_ROLES}
    num_bytes = num_weights = 0
    for name, info in checkpoint.tensors.items():
        leaf = name.rpartition(".")[2]
        if _module(name) not in modules or leaf == "bias":
            continue
        num_bytes += info.num_bytes
        if leaf == "weight_shape":  # of packed codes
            num_weights += int(checkpoint.read(name).prod())
        elif roles[name] in LINEAR_ROLES and not leaf.startswith("weight_"):
            num_weights += math.prod(info.shape)
    return Size(8 * num_bytes / num_weights if num_weights else math.nan, checkpoint.num_bytes)


def _module(tensor_name: str) -> str:
    return tensor_name.rpartition(".")[0]
