"""Keys and values as the codes of a quantized cache, and back: code = round(clamp(x / scale)), value = code · scale.

The arithmetic is in the dtype of x, which is the model's. INT8 has 127 steps to each side of a scale of amax / 127;
not amax / 127.5, as for linears: that puts the largest value on a rounding boundary, where the last bit of it decides
about a whole step.
"""

from typing import Literal

import torch
from torch import Tensor

from quantkit.numerics.affine import E4M3_MAX

KVDtype = Literal["fp8", "int8"]
# the code of amax on a scale of amax / LARGEST
LARGEST: dict[KVDtype, float] = {"fp8": E4M3_MAX, "int8": 127.0}


def encode_kv(x: Tensor, dtype: KVDtype, scale: Tensor) -> Tensor:
    """Codes, float8_e4m3fn or int8, of x's shape. scale: of x's dtype, broadcast against it."""
    scaled = x / scale
    if dtype == "fp8":
        return scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return scaled.clamp(-128, 127).round().to(torch.int8)


def decode_kv(codes: Tensor, scale: Tensor) -> Tensor:
    """Values of codes, in the dtype of the scale."""
    return codes.to(scale.dtype) * scale


def round_trip_kv(x: Tensor, dtype: KVDtype, scale: Tensor) -> Tensor:
    """x as attention sees it through the cache."""
    scale = scale.to(x.dtype)
    return decode_kv(encode_kv(x, dtype, scale), scale)
