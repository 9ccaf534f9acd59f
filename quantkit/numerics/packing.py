"""Integer codes <-> the int32 words of compressed-tensors' pack-quantized format.

A signed b-bit code q is stored unsigned as u = q + 2^(b−1). Element i of a row takes bits i·b … i·b+b−1 of
the row's little-endian bit stream, element 0 in the lowest bits of word 0; unused high bits are 0:

    b = 4:   word 0 = | u7 | u6 | u5 | u4 | u3 | u2 | u1 | u0 |     (bit 31 … bit 0)

Only b in {2, 4, 8} is offered: for the others two published versions of the format disagree.
"""

import torch
from torch import Tensor

PACKABLE_BITS = (2, 4, 8)
CHUNK_CODES = 1 << 22  # packed at a time: each takes 8 bytes on the way


def packed_width(num_codes: int, bits: int) -> int:
    """Words that hold a row of num_codes codes."""
    return -(-num_codes * bits // 32)


def pack(codes_NK: Tensor, bits: int) -> Tensor:
    """Signed codes, int8 [N, K] in [−2^(b−1), 2^(b−1)−1], to int32 [N, ceil(K·b/32)]."""
    assert bits in PACKABLE_BITS, f"{bits}-bit codes have no settled layout"
    num_rows, num_codes = codes_NK.shape
    packed = torch.empty(num_rows, packed_width(num_codes, bits), dtype=torch.int32, device=codes_NK.device)
    step = max(1, CHUNK_CODES // max(1, num_codes))
    for start in range(0, num_rows, step):
        packed[start : start + step] = _pack_rows(codes_NK[start : start + step], bits)
    return packed


def _pack_rows(codes_NK: Tensor, bits: int) -> Tensor:
    num_rows, num_codes = codes_NK.shape
    per_word = 32 // bits
    unsigned = codes_NK.to(torch.int32) + (1 << (bits - 1))
    unsigned = torch.nn.functional.pad(unsigned, (0, -num_codes % per_word))
    words = unsigned.reshape(num_rows, packed_width(num_codes, bits), per_word)
    packed: Tensor = words[..., 0].clone()
    for slot in range(1, per_word):
        packed |= words[..., slot] << (slot * bits)  # int32 shifts wrap into the sign bit as intended
    return packed


def unpack(packed: Tensor, bits: int, num_codes: int) -> Tensor:
    """The inverse of `pack`: int32 [N, W] to int8 [N, num_codes]."""
    assert bits in PACKABLE_BITS, f"{bits}-bit codes have no settled layout"
    # A word's lowest bits are in its first byte. Flat first: one column may be contiguous with any stride.
    in_bytes = packed.reshape(-1).contiguous().view(torch.uint8).view(packed.shape[0], -1)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    codes = (in_bytes.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    codes -= 1 << (bits - 1)  # wraps into two's complement
    return codes.view(torch.int8).flatten(1)[:, :num_codes].contiguous()
