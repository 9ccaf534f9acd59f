"""Rotations that a plan folds into the weights before anything is observed: the same function, flatter weights.

Two of them, both orthogonal: of each head's values, between v_proj and o_proj; and of the residual stream, which
needs an output head of its own. A tied head stays tied, so its model gets the first alone.
"""

from collections.abc import Mapping

from torch import Tensor

from quantkit.arch.pairs import EMBEDDING, FINAL_NORM, HEAD, Link, layer_wiring, read_heads, why_unrotatable
from quantkit.calibration.folding import rotate_ends, rotate_stream, rotate_values
from quantkit.formats.checkpoint import Checkpoint
from quantkit.numerics.hadamard import random_rotation
from quantkit.recipe import QuantPlan


class Folds:
    """What `rotate` in a plan changes; nothing without it. Everything returned is float32."""

    def __init__(self, checkpoint: Checkpoint, plan: QuantPlan) -> None:
        self._checkpoint = checkpoint
        self._rotates = "rotate" in plan.recipe.algorithms
        self._dtype = plan.scale_dtype
        self._seed = plan.recipe.seed
        self.why_not_stream = why_stream_stays(checkpoint) if self._rotates else "the recipe does not rotate"

    @property
    def changes_outside(self) -> bool:
        """Whether embedding, final norm and head change."""
        return self.why_not_stream is None

    def outside(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors outside the layers that change, by their names on disk."""
        if self.why_not_stream is not None:
            return {}
        names = (f"{EMBEDDING}.weight", f"{FINAL_NORM}.weight", f"{HEAD}.weight")
        size = tensors[names[0]].shape[1]
        embedding_VE, final_norm_E, head_VE = (tensors[name] for name in names)
        ends = rotate_ends(embedding_VE, final_norm_E, head_VE, random_rotation(size, self._seed))
        return dict(zip(names, ends, strict=True))

    def layer(self, layer: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a layer that change, by names below it."""
        if not self._rotates:
            return {}
        wiring = layer_wiring(self._checkpoint, layer)
        heads = read_heads(self._checkpoint)
        changed: dict[str, Tensor] = {}
        for pair in wiring.pairs:
            if pair.link is Link.VALUES:
                rotation = random_rotation(heads.dim, self._seed)
                changed |= rotate_values({**tensors, **changed}, pair, heads, rotation)
        if self.why_not_stream is None:
            size = self._checkpoint.info(f"{EMBEDDING}.weight").shape[1]
            rotation = random_rotation(size, self._seed)
            changed |= rotate_stream({**tensors, **changed}, wiring.pairs, wiring.writers, rotation)
        return changed

    def rounded(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Changed tensors as they are stored where they stay unquantized."""
        return {name: tensor.to(self._dtype).cpu().contiguous() for name, tensor in tensors.items()}


def why_stream_stays(checkpoint: Checkpoint) -> str | None:
    """Why `rotate` leaves the residual stream of this checkpoint alone, or None if it rotates it."""
    reason = why_unrotatable(checkpoint)
    if reason is None and f"{HEAD}.weight" not in checkpoint.tensors:
        return "its output head is tied to the embedding, and a rotation would untie them"
    return reason
