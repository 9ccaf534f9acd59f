"""Scales and rotations folded into the weights of one decoder layer, so that its outputs stay what they were.

Tensors are those of one layer by their names on disk below it ("self_attn.v_proj.weight"), any float dtype;
what comes back are the changed ones, float32. `arch.pairs` says what can be folded; callers round to the
model's dtype, which is where a change of outputs can come from.

With inputs rotated as x' = x · R, a linear that reads them becomes W · R, and one that writes them Rᵀ · W. Source:
arXiv:2404.00456 (the residual stream), arXiv:2405.16406 section 3 (R1, and R2 between values and outputs).

Shape suffixes: N out_features, K channels, E hidden size, V vocabulary, D head_dim.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.arch.pairs import Heads, Link, Pair
from quantkit.numerics.hadamard import Rotation, rotate

Tensors = Mapping[str, Tensor]
NORM_OFFSET = {Link.NORM: 0.0, Link.NORM_PLUS_ONE: 1.0}


def fold_scale(
    tensors: Tensors, pair: Pair, scale_K: Tensor, *, heads: Heads, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Inputs of `pair.to` divided by a scale per channel, their weights multiplied by it.

    scale_K: > 0, one per channel that `prev` computes; for VALUES that is [num_kv · dim].
    dtype: the norm's dtype on disk. A norm is rounded to it here, and the linears multiplied by the scale that
    remains, so that storing the norm costs nothing.
    """
    assert bool((scale_K > 0).all() and scale_K.isfinite().all()), (
        "an algorithm returned a scale that is none"
    )
    scale_K = scale_K.float()
    if pair.link in NORM_OFFSET:
        norm = tensors[f"{pair.prev}.weight"].float()
        norm, scale_K = _divided_norm(norm, scale_K, NORM_OFFSET[pair.link], dtype)
        changed = {f"{pair.prev}.weight": norm}
    else:
        changed = {name: _divided_rows(tensor, scale_K) for name, tensor in _module(tensors, pair.prev)}
    if pair.link is Link.VALUES:
        scale_K = by_query_head(scale_K, heads)
    return changed | {f"{name}.weight": tensors[f"{name}.weight"].float() * scale_K for name in pair.to}


def rotate_values(tensors: Tensors, pair: Pair, heads: Heads, rotation: Rotation) -> dict[str, Tensor]:
    """The values of every head rotated, and o_proj with them; rotation: of `heads.dim` channels.

    Needs nothing else to change: works with tied heads, biases and values shared by query heads. The KV cache
    then holds rotated values.
    """
    assert pair.link is Link.VALUES, "only values are mixed head by head"
    num_rows = heads.num_kv * heads.dim
    changed: dict[str, Tensor] = {}
    for name, tensor in _module(tensors, pair.prev):
        kept, values = tensor[:-num_rows].float(), tensor[-num_rows:].float()
        changed[name] = torch.cat([kept, _rotate_outputs_of_heads(values, rotation)])
    for name in pair.to:
        changed[f"{name}.weight"] = _rotate_inputs_of_heads(tensors[f"{name}.weight"].float(), rotation)
    return changed


def rotate_stream(
    tensors: Tensors, pairs: Iterable[Pair], writers: Iterable[str], rotation: Rotation
) -> dict[str, Tensor]:
    """One layer between a rotated residual stream and a rotated residual stream.

    Each norm's weight moves into the linears that read it and becomes 1, since R commutes with the division
    by the norm but not with weights; then readers are multiplied by R, writers and their biases by Rᵀ. Every
    layer needs it, with the same rotation, and `rotate_ends`; whoever calls has asked `why_unrotatable`.
    """
    changed: dict[str, Tensor] = {}
    for pair in pairs:
        if pair.link is Link.NORM:
            norm_K = tensors[f"{pair.prev}.weight"].float()
            changed[f"{pair.prev}.weight"] = torch.ones_like(norm_K)
            for name in pair.to:
                weight = tensors[f"{name}.weight"].float() * norm_K
                changed[f"{name}.weight"] = rotate(weight, rotation)
    for writer in writers:
        changed |= {
            name: _rotate_outputs(tensor.float(), rotation) for name, tensor in _module(tensors, writer)
        }
    return changed


class Ends(NamedTuple):
    """What is before the first and after the last layer, float32."""

    embedding_VE: Tensor
    final_norm_E: Tensor
    head_VE: Tensor


def rotate_ends(embedding_VE: Tensor, final_norm_E: Tensor, head_VE: Tensor, rotation: Rotation) -> Ends:
    """Embedding and head of a rotated residual stream; the final norm moves into the head.

    A tied head cannot stay tied: give the embedding as the head, store both, and say
    "tie_word_embeddings": false in config.json.
    """
    return Ends(
        embedding_VE=rotate(embedding_VE.float(), rotation),
        final_norm_E=torch.ones_like(final_norm_E, dtype=torch.float32),
        head_VE=rotate(head_VE.float() * final_norm_E.float(), rotation),
    )


def _rotate_outputs(w_NK: Tensor, rotation: Rotation) -> Tensor:
    """Rᵀ · W; a bias [N] becomes bias · R."""
    return rotate(w_NK, rotation) if w_NK.ndim == 1 else rotate(w_NK.T, rotation).T.contiguous()


def _rotate_inputs_of_heads(w_NK: Tensor, rotation_D: Rotation) -> Tensor:
    """The same rotation for the inputs of each head: K is heads · D."""
    heads = w_NK.reshape(len(w_NK), -1, len(rotation_D.signs_K))
    return rotate(heads, rotation_D).reshape(w_NK.shape)


def _rotate_outputs_of_heads(w_NK: Tensor, rotation_D: Rotation) -> Tensor:
    """The same rotation for the outputs of each head: N is heads · D; a bias [N] likewise."""
    if w_NK.ndim == 1:
        return rotate(w_NK.reshape(-1, len(rotation_D.signs_K)), rotation_D).reshape(w_NK.shape)
    return _rotate_inputs_of_heads(w_NK.T, rotation_D).T.contiguous()


def _module(tensors: Tensors, name: str) -> list[tuple[str, Tensor]]:
    """Weight and, if there is one, bias of a linear, by their full names."""
    names = [f"{name}.weight", f"{name}.bias"]
    return [(full, tensors[full]) for full in names if full in tensors]


def _divided_norm(
    norm_K: Tensor, scale_K: Tensor, offset: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The norm's weight divided and rounded to dtype, and the scale that it was divided by in effect.

    A channel that would round to 0 is not scaled.
    """
    factor = norm_K + offset
    divided = (factor / scale_K - offset).to(dtype).float()
    is_lost = divided + offset == 0
    divided = torch.where(is_lost, norm_K, divided)
    return divided, torch.where(is_lost, 1.0, factor / (divided + offset))


def _divided_rows(tensor: Tensor, scale_K: Tensor) -> Tensor:
    """The last rows of a weight or bias divided; rows before them belong to what it is fused with."""
    changed = tensor.to(torch.float32, copy=True)
    changed[-len(scale_K) :] /= scale_K.view(-1, *[1] * (tensor.ndim - 1))
    return changed


def by_query_head(scale_K: Tensor, heads: Heads) -> Tensor:
    """[num_kv · dim] -> [num · dim]: query heads share key-value heads in runs."""
    per_value = scale_K.reshape(heads.num_kv, 1, heads.dim)
    return per_value.expand(-1, heads.num // heads.num_kv, -1).flatten()
