"""Checkpoints of AutoGPTQ and GPTQModel, read as 16-bit models: w = (code − zero point) · scale.

A linear [N, K] of b-bit codes, G groups of inputs, prefix `<module>.`:

    qweight  I32 [K·b/32, N]     column n: the codes of row n as one little-endian bit stream, 32 bits to a word
    qzeros   I32 [G, N·b/32]     row g: the zero points of group g, likewise along the outputs
    scales   F16 [G, N]
    g_idx    I32 [K]             the group of each input; absent: k // group_size

A code of 3 bits may lie in two words. In the first version of the format (`checkpoint_format` "gptq", or none) words
of zero points are stored minus one in each field, borrows included; "gptq_v2" stores them as they are.
Source: the packing functions of AutoGPTQ 0.7 and GPTQModel 5.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.dequantized import DequantizedCheckpoint, Read, check_parts, packed_words, read_section
from quantkit.numerics.affine import dequantize
from quantkit.numerics.packing import packed_width, unpack

BITS = (4, 2, 3, 8)
READ = {
    "bits": BITS,
    "desc_act": (False, True),
    "checkpoint_format": ("gptq", "gptq_v2"),
    "is_marlin_format": (False,),
    "pack_dtype": ("int32",),
}


class GptqWeights(NamedTuple):
    """One linear: qweight as stored; signed zero points and scales [N, G]; the group of each input [K]."""

    qweight: Tensor
    bits: int
    zero_points_NG: Tensor
    scales_NG: Tensor
    groups_K: Tensor

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the weight, float32 [stop − start, K]."""
        codes_RK = _unpack(self.qweight[:, start:stop].T, self.bits, len(self.groups_K))
        scale_RK = self.scales_NG[start:stop].index_select(1, self.groups_K)
        zero_point_RK = self.zero_points_NG[start:stop].index_select(1, self.groups_K)
        return dequantize(codes_RK, scale_RK, zero_point_RK)


class GptqLayout:
    """The linears of one checkpoint. Bits may differ by linear; where g_idx is absent, they are those of the config."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        section = read_section(checkpoint, READ)
        self._checkpoint = checkpoint
        self._bits: int = section["bits"]
        self._group_size: int = section["group_size"]
        self._has_order: bool = section["desc_act"]
        self._is_first_version = section["checkpoint_format"] == "gptq"

    def shape(self, module: str) -> tuple[int, int]:
        """[N, K], with everything that stores it checked."""
        num_words, num_rows = packed_words(self._checkpoint, module)
        num_cols = self._num_cols(module)
        bits = 32 * num_words // num_cols
        if bits not in BITS or bits * num_cols != 32 * num_words:
            raise self._checkpoint.mismatch(f"{module}.qweight has {num_words} words for {num_cols} inputs")
        num_groups = self._checkpoint.info(f"{module}.scales").shape[0]
        check_parts(self._checkpoint, module, num_groups, num_rows, packed_width(num_rows, bits))
        return num_rows, num_cols

    def open(self, module: str, read: Read) -> GptqWeights:
        """Read one linear. Raises SourceError if an input's group is none of those that have scales."""
        num_rows, num_cols = self.shape(module)
        qweight, scales_GN = read(f"{module}.qweight"), read(f"{module}.scales")
        bits = 32 * len(qweight) // num_cols
        words = read(f"{module}.qzeros")
        zero_points_GN = (
            _plus_one(words, bits, num_rows) if self._is_first_version else _unpack(words, bits, num_rows)
        )
        groups_K = self._groups(module, num_cols, read).to(qweight.device)
        if not 0 <= int(groups_K.min()) <= int(groups_K.max()) < len(scales_GN):
            raise self._checkpoint.mismatch(f"{module} has {len(scales_GN)} groups, and inputs of others")
        return GptqWeights(qweight, bits, zero_points_GN.T, scales_GN.T, groups_K)

    def _num_cols(self, module: str) -> int:
        name = f"{module}.g_idx"
        if name in self._checkpoint.tensors or self._has_order:
            info = self._checkpoint.info(name)
            if info.dtype not in (torch.int32, torch.int64) or len(info.shape) != 1 or 0 in info.shape:
                raise self._checkpoint.mismatch(f"{name} is {info.dtype} {list(info.shape)}, not int32 [K]")
            return info.shape[0]
        return self._checkpoint.info(f"{module}.qweight").shape[0] * 32 // self._bits

    def _groups(self, module: str, num_cols: int, read: Read) -> Tensor:
        name = f"{module}.g_idx"
        if name in self._checkpoint.tensors:
            return read(name).long()
        return torch.arange(num_cols) // (num_cols if self._group_size == -1 else self._group_size)


def open_gptq(checkpoint: Checkpoint) -> DequantizedCheckpoint:
    """A GPTQ checkpoint as a model in 16 bits. Raises SourceError for a variant of the format that is not read."""
    return DequantizedCheckpoint(checkpoint, GptqLayout(checkpoint))


def _plus_one(words: Tensor, bits: int, num_codes: int) -> Tensor:
    """Signed zero points of words in which each is stored minus one."""
    if 32 % bits:  # fields across words: each by itself
        stored = _unpack(words, bits, num_codes)
        return (stored + 1 + (1 << (bits - 1))) % (1 << bits) - (1 << (bits - 1))
    ones = sum(1 << shift for shift in range(0, 32, bits))
    return _unpack(words + ones, bits, num_codes)  # wraps as the writer's subtraction did


def _unpack(words: Tensor, bits: int, num_codes: int) -> Tensor:
    """int32 [R, W] to codes, int8 [R, num_codes], of which 2^(b − 1) is taken off: signed, as ours are."""
    if 32 % bits == 0:
        return unpack(words, bits, num_codes)
    in_bytes = words.contiguous().view(torch.uint8)
    shifts = torch.arange(8, dtype=torch.uint8, device=words.device)
    stream = ((in_bytes.unsqueeze(-1) >> shifts) & 1).flatten(1)[:, : bits * num_codes]
    fields = stream.reshape(-1, num_codes, bits).to(torch.int8)
    place_values = 1 << torch.arange(bits, dtype=torch.int8, device=words.device)
    return (fields * place_values).sum(-1, dtype=torch.int8) - (1 << (bits - 1))
