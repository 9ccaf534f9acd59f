"""Keys and values of all layers: in which dtype each layer stores them, what a token takes, the pools themselves.

    auto         as the checkpoint says: FP8 or INT8 with its calibrated scales, kept layers in the model's dtype
    bf16 …       the model's own dtype, whatever the checkpoint says
    fp8, int8    calibrated scales where the checkpoint has them for this dtype, else one per token and head, made from
                 the token itself as it is stored; layers that the checkpoint keeps stay kept

Knows nothing of which sequence has which block.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.errors import SchemeError
from quantkit.formats.kv_cache import StoredKV
from quantkit.runtime.settings import KVCacheDtypeName
from quantkit_kernels.paged_kv import BLOCK_SIZE, KVPool, create_pool

PLAIN: Mapping[KVCacheDtypeName, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}
CODES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}


class LayerKV(NamedTuple):
    """How one layer stores keys and values. scales: k's and v's, one or one per head; None: 16 or 32 bits, no scales.

    is_dynamic: scales are made per token and head instead.
    """

    dtype: torch.dtype
    scales: tuple[Tensor, Tensor] | None = None
    is_dynamic: bool = False


class KVFormat(NamedTuple):
    """How all layers store keys and values."""

    layers: tuple[LayerKV, ...]
    num_heads: int
    head_dim: int
    model_dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """Bytes that a token takes in all layers, scales per token included."""
        per_head = [
            2 * (self.head_dim * layer.dtype.itemsize + 4 * layer.is_dynamic) for layer in self.layers
        ]
        return self.num_heads * sum(per_head)

    def create_pools(
        self, num_blocks: int, device: torch.device, *, block_size: int = BLOCK_SIZE
    ) -> list[KVPool]:
        """A pool of zeros for each layer, so that what nobody has written is finite."""
        return [self._pool(layer, num_blocks, block_size, device) for layer in self.layers]

    def _pool(self, layer: LayerKV, num_blocks: int, block_size: int, device: torch.device) -> KVPool:
        per_token = (num_blocks, self.num_heads, block_size)
        pool = create_pool(
            num_blocks,
            self.num_heads,
            self.head_dim,
            layer.dtype,
            scale_shape=per_token if layer.is_dynamic else None,
            block_size=block_size,
            device=device,
        )
        if layer.scales is None:
            return pool
        k_scale, v_scale = (self._per_head(scale).to(device) for scale in layer.scales)
        return pool._replace(k_scale=k_scale, v_scale=v_scale)

    def _per_head(self, scale: Tensor) -> Tensor:
        """float32 [H], as exact as codes are made with it: in the dtype of the model."""
        return scale.flatten().to(self.model_dtype).float().expand(self.num_heads).contiguous()


def choose_format(
    stored: StoredKV | None,
    asked: KVCacheDtypeName,
    *,
    num_layers: int,
    num_heads: int,
    head_dim: int,
    dtype: torch.dtype,
) -> KVFormat:
    """The format for a model in `dtype`. stored: what its checkpoint says of the cache.

    Warns where FP8 codes have a scale of 1.0 in all layers, which is no calibration. Raises SchemeError for 16 or 32
    bits that are not the model's.
    """
    if asked in PLAIN and PLAIN[asked] != dtype:
        own = next(name for name, plain in PLAIN.items() if plain == dtype)
        raise SchemeError(
            f"a KV cache in {asked} for a model that computes in {own}",
            fix=f"ask for auto, which is {own}, for fp8 or int8, or load the model in {asked}",
        )
    if asked in PLAIN or (asked == "auto" and stored is None):
        layers = [LayerKV(dtype)] * num_layers
    else:
        layers = [_layer(stored, asked, layer, dtype) for layer in range(num_layers)]
        _warn_of_ones(layers)
    return KVFormat(tuple(layers), num_heads, head_dim, dtype)


def _layer(stored: StoredKV | None, asked: KVCacheDtypeName, layer: int, dtype: torch.dtype) -> LayerKV:
    if stored is not None and layer in stored.kept_layers:
        return LayerKV(dtype)
    if stored is not None and asked in ("auto", stored.scheme.dtype):
        is_dynamic = stored.scheme.granularity == "token"
        return LayerKV(CODES[stored.scheme.dtype], None if is_dynamic else stored.scales[layer], is_dynamic)
    return LayerKV(CODES[asked], None, True)


def _warn_of_ones(layers: Sequence[LayerKV]) -> None:
    scales = [scale for layer in layers if layer.scales is not None for scale in layer.scales]
    if scales and all(bool((scale == 1).all()) for scale in scales):
        warnings.warn(
            "every scale of the KV cache is 1.0: nobody has calibrated it, and keys and values beyond the range of the "
            "codes are cut off. Ask for another KV cache dtype, or quantize again with calibrated scales.",
            stacklevel=2,
        )
