"""Keys and values of one sequence, contiguous and growing, stored in 16/32 bits or as the checkpoint says.

A quantized cache holds codes; attention always gets their round trip, for the tokens of the current step too.
The arithmetic is in the model's dtype: code = round(clamp(x / scale)), value = code · scale, with stored scales
(FP8; INT8 per head) or amax / 127 over one token of one head (INT8 per token). Not amax / 127.5, as for linears:
that puts the largest value on a rounding boundary, where the last bit of it decides about a whole step.

Shape suffixes: T new tokens, S all tokens, H KV heads, D head_dim.
"""

import torch
from torch import Tensor

from quantkit.formats.kv_cache import StoredKV
from quantkit.numerics.affine import E4M3_MAX
from quantkit_kernels.float8 import REBIAS, decode_shifted

FIRST_CAPACITY = 256


class KVCache:
    """Keys and values of every layer. `num_tokens` counts finished steps; `append` writes behind them."""

    def __init__(
        self, *, num_layers: int, num_heads: int, head_dim: int, dtype: torch.dtype, stored: StoredKV | None
    ) -> None:
        self.num_tokens = 0
        self.dtype = dtype
        self._layers = [
            tuple(_Part(num_heads, head_dim, dtype, stored, scale) for scale in _scales(stored, layer))
            for layer in range(num_layers)
        ]

    def append(self, layer: int, k_HTD: Tensor, v_HTD: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new keys and values of one layer; returns all of its keys and values, [H, S, D] each."""
        keys, values = self._layers[layer]
        return keys.append(self.num_tokens, k_HTD), values.append(self.num_tokens, v_HTD)

    def advance(self, num_tokens: int) -> None:
        """Count the tokens that every layer has appended."""
        self.num_tokens += num_tokens

    @property
    def num_bytes(self) -> int:
        """Bytes allocated."""
        return sum(part.num_bytes for layer in self._layers for part in layer)


class _Part:
    """The keys, or the values, of one layer."""

    def __init__(
        self, num_heads: int, head_dim: int, dtype: torch.dtype, stored: StoredKV | None, scale: Tensor | None
    ) -> None:
        self.dtype = dtype
        self.store = None if stored is None else stored.scheme.dtype
        self.scale = None if scale is None else scale.to(dtype)
        self.is_dynamic = stored is not None and stored.scheme.granularity == "token"
        code_dtype = {None: dtype, "fp8": torch.float8_e4m3fn, "int8": torch.int8}[self.store]
        self.codes_HSD = torch.empty(num_heads, FIRST_CAPACITY, head_dim, dtype=code_dtype)
        self.scale_HS1 = torch.empty(num_heads, FIRST_CAPACITY if self.is_dynamic else 0, 1, dtype=dtype)

    def append(self, start: int, x_HTD: Tensor) -> Tensor:
        stop = start + x_HTD.shape[1]
        self._grow(stop)
        if self.store is None:
            self.codes_HSD[:, start:stop] = x_HTD
            return self.codes_HSD[:, :stop]
        scale = self.scale
        if self.is_dynamic:
            scale = x_HTD.abs().amax(dim=-1, keepdim=True) / 127
            scale = scale.masked_fill(scale == 0, torch.finfo(self.dtype).eps)
            self.scale_HS1[:, start:stop] = scale
        assert scale is not None, "a quantized cache has stored or dynamic scales"
        scaled = x_HTD / scale
        if self.store == "fp8":
            self.codes_HSD[:, start:stop] = scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        else:
            self.codes_HSD[:, start:stop] = scaled.clamp(-128, 127).round().to(torch.int8)
        return self._values(stop)

    def _values(self, stop: int) -> Tensor:
        codes = self.codes_HSD[:, :stop]
        scale = self.scale_HS1[:, :stop] if self.is_dynamic else self.scale
        assert scale is not None, "a quantized cache has stored or dynamic scales"
        if self.store == "fp8":
            return (decode_shifted(codes) * REBIAS).to(self.dtype) * scale
        return codes.to(self.dtype) * scale

    def _grow(self, num_tokens: int) -> None:
        capacity = self.codes_HSD.shape[1]
        if num_tokens <= capacity:
            return
        extra = max(num_tokens, 2 * capacity) - capacity
        self.codes_HSD = _longer(self.codes_HSD, extra)
        if self.is_dynamic:
            self.scale_HS1 = _longer(self.scale_HS1, extra)

    @property
    def num_bytes(self) -> int:
        return self.codes_HSD.nbytes + self.scale_HS1.nbytes


def _longer(tensor: Tensor, extra: int) -> Tensor:
    num_heads, capacity, width = tensor.shape
    longer = tensor.new_empty(num_heads, capacity + extra, width)
    longer[:, :capacity] = tensor
    return longer


def _scales(stored: StoredKV | None, layer: int) -> tuple[Tensor | None, Tensor | None]:
    if stored is None or not stored.scales:
        return None, None
    return stored.scales[layer]
