"""What one pass through the decoder shares between its layers: positions, rotations, masks, the cache."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.runtime.kv_cache import KVCache
from quantkit.runtime.layers.rotary import Rope, cos_sin


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One pass over `num_new` tokens that follow `num_cached` ones.

    cos_sin: per kind of rotation. visible: per window, bool [num_new, keys from `first_visible` on], or None.
    """

    num_cached: int
    num_new: int
    cos_sin: Mapping[Rope, tuple[Tensor, Tensor]]
    visible: Mapping[int | None, Tensor | None]
    cache: KVCache

    def mask(self, window: int | None) -> Tensor | None:
        """Which keys each new token sees, or None where plain causality says it."""
        return self.visible[window]

    def first_visible(self, window: int | None) -> int:
        """The oldest key that any new token sees."""
        return first_visible(self.num_cached, window)


def plan_step(
    cache: KVCache, num_new: int, *, ropes: Iterable[Rope], windows: Iterable[int | None], head_dim: int
) -> Step:
    """Everything that layers share in the next pass over `num_new` tokens."""
    num_cached = cache.num_tokens
    positions_T = torch.arange(num_cached, num_cached + num_new)
    return Step(
        num_cached=num_cached,
        num_new=num_new,
        cos_sin={rope: cos_sin(rope, head_dim, positions_T, cache.dtype) for rope in set(ropes)},
        visible={window: _visible(num_cached, num_new, window) for window in set(windows)},
        cache=cache,
    )


def first_visible(num_cached: int, window: int | None) -> int:
    """The oldest key that a token at position num_cached sees; later tokens see no older ones."""
    return 0 if window is None else max(0, num_cached - window + 1)


def _visible(num_cached: int, num_new: int, window: int | None) -> Tensor | None:
    is_plain = num_cached == 0 and (window is None or num_new <= window)
    if num_new == 1 or is_plain:
        return None
    query = torch.arange(num_cached, num_cached + num_new)[:, None]
    key = torch.arange(first_visible(num_cached, window), num_cached + num_new)[None, :]
    visible = key <= query
    return visible if window is None else visible & (key > query - window)
