"""Keys and values of one sequence, contiguous and growing, stored in 16/32 bits or as the checkpoint says.

A quantized cache holds codes; attention always gets their round trip, for the tokens of the current step too.
The arithmetic is `numerics.kv_codes`'s, in the model's dtype, with stored scales (FP8; INT8 per head) or amax / 127
over one token of one head (INT8 per token). Layers that the checkpoint's plan keeps are in 16/32 bits.

Shape suffixes: T new tokens, S all tokens, H KV heads, D head_dim.
"""

import torch
from torch import Tensor

from quantkit.formats.kv_cache import StoredKV
from quantkit.numerics.kv_codes import LARGEST, decode_kv, encode_kv
from quantkit_kernels.float8 import REBIAS, decode_shifted

FIRST_CAPACITY = 256


class KVCache:
    """Keys and values of every layer. `num_tokens` counts finished steps; `append` writes behind them."""

    def __init__(
        self, *, num_layers: int, num_heads: int, head_dim: int, dtype: torch.dtype, stored: StoredKV | None
    ) -> None:
        self.num_tokens = 0
        self.dtype = dtype
        self._layers = [_parts(num_heads, head_dim, dtype, stored, layer) for layer in range(num_layers)]

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
            scale = x_HTD.abs().amax(dim=-1, keepdim=True) / LARGEST["int8"]
            scale = scale.masked_fill(scale == 0, torch.finfo(self.dtype).eps)
            self.scale_HS1[:, start:stop] = scale
        assert scale is not None, "a quantized cache has stored or dynamic scales"
        self.codes_HSD[:, start:stop] = encode_kv(x_HTD, self.store, scale)
        return self._values(stop)

    def _values(self, stop: int) -> Tensor:
        codes = self.codes_HSD[:, :stop]
        scale = self.scale_HS1[:, :stop] if self.is_dynamic else self.scale
        assert scale is not None, "a quantized cache has stored or dynamic scales"
        if self.store == "fp8":
            return (decode_shifted(codes) * REBIAS).to(self.dtype) * scale
        return decode_kv(codes, scale)

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


def _parts(
    num_heads: int, head_dim: int, dtype: torch.dtype, stored: StoredKV | None, layer: int
) -> tuple[_Part, _Part]:
    """Keys and values of one layer."""
    if stored is None or layer in stored.kept_layers:
        return _Part(num_heads, head_dim, dtype, None, None), _Part(num_heads, head_dim, dtype, None, None)
    k_scale, v_scale = stored.scales[layer] if stored.scales else (None, None)
    return (
        _Part(num_heads, head_dim, dtype, stored, k_scale),
        _Part(num_heads, head_dim, dtype, stored, v_scale),
    )
