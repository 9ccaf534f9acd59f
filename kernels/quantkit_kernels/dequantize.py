"""The path that always exists: dequantize some rows, multiply, go on. Any format, any float dtype, any M.

Codes of 2 and 4 bits are kept packed, in a layout of its own whose unpacking is a straight copy. With
p = 8 / bits codes per byte and H = ceil(K / p), byte j of a row holds the codes of columns j, j + H, j + 2H …:

    4 bits:   byte j = | u[j + H] | u[j] |          u = code + 2^(bits − 1), lowest columns in the lowest bits

Bound: reads bits / 8 bytes per weight, writes and reads back one float chunk that stays in the cache; the
multiplication is the dense one, so for large M this costs what the dense matmul costs.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from quantkit_kernels.dense import linear
from quantkit_kernels.float8 import REBIAS, decode_shifted
from quantkit_kernels.weight import LinearWeight

CHUNK_ELEMENTS = 1 << 20  # weights made dense at a time: 4 MB in float32


class Dequantized(NamedTuple):
    """A weight as this kernel keeps it: codes (packed below 8 bits), scales and offsets in `compute_dtype`."""

    stored: Tensor
    scale_RG: Tensor
    offset_RG: Tensor | None  # zero point, plus 2^(bits − 1) where the stored codes are unsigned
    tile: tuple[int, int]
    shape: tuple[int, int]
    bits: int
    dtype: torch.dtype


def supports(weight: LinearWeight, dtype: torch.dtype) -> bool:
    """Everything."""
    return dtype.is_floating_point


def prepare(weight: LinearWeight, dtype: torch.dtype) -> Dequantized:
    """Lay the weight out; `dtype` is that of the activations.

    A product of code and scale is rounded once, to `dtype`: the arithmetic is float32 unless the scale is
    exact in `dtype` (codes always are).
    """
    is_float8 = weight.codes_NK.dtype == torch.float8_e4m3fn
    exact = torch.equal(weight.scale_RG.to(dtype).float(), weight.scale_RG.float())
    compute_dtype = dtype if exact and not is_float8 else torch.float32
    stored, shift = weight.codes_NK.contiguous(), 0
    if weight.bits in (2, 4):
        stored, shift = pack_planes(stored, weight.bits), 2 ** (weight.bits - 1)
    offset = None
    if weight.zero_point_RG is not None:
        offset = weight.zero_point_RG.to(compute_dtype) + shift
    elif shift:
        offset = torch.full((1, 1), shift, dtype=compute_dtype, device=stored.device)
    scale = weight.scale_RG.to(compute_dtype) * (REBIAS if is_float8 else 1)
    num_rows, num_cols = weight.codes_NK.shape
    return Dequantized(stored, scale, offset, weight.tile, (num_rows, num_cols), weight.bits, dtype)


def run(x_MK: Tensor, weight: Dequantized) -> Tensor:
    """x · wᵀ, [M, N], in the dtype of x."""
    num_rows, num_cols = weight.shape
    step = max(1, CHUNK_ELEMENTS // num_cols)
    if step >= num_rows:
        return linear(x_MK, dense_rows(weight, 0, num_rows))
    y_MN = x_MK.new_empty(x_MK.shape[0], num_rows)
    for start in range(0, num_rows, step):
        stop = min(start + step, num_rows)
        y_MN[:, start:stop] = linear(x_MK, dense_rows(weight, start, stop))
    return y_MN


def dense_rows(weight: Dequantized, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of the dequantized weight, [rows, K]."""
    w = _codes(weight, start, stop)
    if weight.offset_RG is not None:
        _apply(torch.Tensor.sub_, w, weight.offset_RG, weight.tile, start)
    _apply(torch.Tensor.mul_, w, weight.scale_RG, weight.tile, start)
    return w.to(weight.dtype)


def pack_planes(codes_NK: Tensor, bits: int) -> Tensor:
    """Signed codes, int8 [N, K], to uint8 [N, ceil(K · bits / 8)] in the layout of the module docstring."""
    per_byte = 8 // bits
    unsigned = (codes_NK + 2 ** (bits - 1)).view(torch.uint8)
    planes = pad(unsigned, (0, -codes_NK.shape[1] % per_byte)).chunk(per_byte, dim=1)
    packed = planes[0].clone()
    for number, plane in enumerate(planes[1:], start=1):
        packed |= plane << (number * bits)
    return packed


def _codes(weight: Dequantized, start: int, stop: int) -> Tensor:
    """Codes of some rows (unsigned where packed) in the compute dtype, freshly allocated."""
    stored = weight.stored[start:stop]
    if stored.dtype == torch.float8_e4m3fn:
        return decode_shifted(stored)
    num_cols, dtype = weight.shape[1], weight.scale_RG.dtype
    if weight.bits not in (2, 4):
        return stored.to(dtype, copy=True)
    w = torch.empty(stop - start, num_cols, dtype=dtype, device=stored.device)
    width = stored.shape[1]
    for number in range(8 // weight.bits):
        plane = (stored >> (number * weight.bits)) & (2**weight.bits - 1)
        first = min(number * width, num_cols)
        last = min(first + width, num_cols)
        w[:, first:last] = plane[:, : last - first]
    return w


def _apply(
    operation: Callable[[Tensor, Tensor], Tensor],
    w: Tensor,
    per_tile: Tensor,
    tile: tuple[int, int],
    start: int,
) -> None:
    """Apply an in-place operation between rows from `start` on and the values of the tiles that they are in."""
    rows, cols = tile
    if per_tile.numel() == 1:
        operation(w, per_tile)
        return
    of_row = torch.arange(start, start + w.shape[0], device=w.device) // rows
    values = per_tile if rows == 1 and w.shape[0] == per_tile.shape[0] else per_tile[of_row]
    if w.shape[1] % cols == 0:
        operation(w.view(w.shape[0], -1, cols), values.unsqueeze(-1))
    else:
        operation(w, values.repeat_interleave(cols, dim=1)[:, : w.shape[1]])
