"""What goes into the KV cache of one layer: watched, or replaced by what a quantized cache gives back.

A decoder layer of transformers hands its keys (after norms and rotary embeddings) and values to the `update` of the
cache it is called with, and attends to what that returns. The two classes here are such caches for the one layer and
the one forward pass that calibration makes of it; they keep nothing.

Shape suffixes: S samples, H KV heads, L tokens, D head_dim.
"""

from typing import Any, NoReturn

import torch
from torch import Tensor

from quantkit.errors import CalibrationError
from quantkit.numerics.kv_codes import KVDtype, round_trip_kv


class KVStats:
    """Largest |key| and |value| of each head. Tokens with NaN or Inf in either are left out and counted."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self.num_excluded = 0
        self._k_absmax_H = self._v_absmax_H = torch.zeros(0)

    def add(self, k_SHLD: Tensor, v_SHLD: Tensor) -> None:
        """Count tokens, in any float dtype."""
        k_SHL, v_SHL = (x.abs().amax(dim=-1).float() for x in (k_SHLD, v_SHLD))
        is_finite_SL = (k_SHL.isfinite() & v_SHL.isfinite()).all(dim=1)
        num_finite = int(is_finite_SL.sum())
        self.num_tokens += num_finite
        self.num_excluded += is_finite_SL.numel() - num_finite
        k_H, v_H = (x.masked_fill(~is_finite_SL[:, None], 0.0).amax(dim=(0, 2)) for x in (k_SHL, v_SHL))
        is_first = self._k_absmax_H.numel() == 0
        self._k_absmax_H = k_H if is_first else torch.maximum(self._k_absmax_H, k_H)
        self._v_absmax_H = v_H if is_first else torch.maximum(self._v_absmax_H, v_H)

    @property
    def num_heads(self) -> int:
        """KV heads; 0 before anything was added."""
        return len(self._k_absmax_H)

    @property
    def absmax(self) -> tuple[Tensor, Tensor]:
        """Of keys and of values, float32 [H] each. Raises CalibrationError if no token was finite."""
        if self.num_tokens == 0:
            raise CalibrationError(
                f"no calibration token has finite keys and values ({self.num_excluded} have NaN or Inf)",
                fix="look at the model's weights: its activations overflow; or leave the KV cache in 16 bits",
            )
        return self._k_absmax_H, self._v_absmax_H


class CacheReached(Exception):  # noqa: N818 (no error: the rest of the layer is not wanted)
    """Keys and values are there."""


class WatchedCache:
    """A cache that tells its statistics, and ends the forward pass by raising CacheReached."""

    def __init__(self, stats: KVStats) -> None:
        self._stats = stats

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> NoReturn:
        """Take keys and values [S, H, L, D]."""
        self._stats.add(key_states, value_states)
        raise CacheReached


class RoundTripCache:
    """A cache that stores codes, as one call sees it. A scale, [1] or [H, 1, 1], that is None: 16 bits."""

    def __init__(self, dtype: KVDtype, k_scale: Tensor | None, v_scale: Tensor | None) -> None:
        self._dtype = dtype
        self._k_scale = k_scale
        self._v_scale = v_scale

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keys and values [S, H, L, D] as they come back."""
        return self._stored(key_states, self._k_scale), self._stored(value_states, self._v_scale)

    def _stored(self, x_SHLD: Tensor, scale: Tensor | None) -> Tensor:
        return x_SHLD if scale is None else round_trip_kv(x_SHLD, self._dtype, scale.to(x_SHLD.device))
