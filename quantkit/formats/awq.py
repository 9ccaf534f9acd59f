"""Checkpoints of AutoAWQ, read as 16-bit models: w = (code − zero point) · scale.

A linear [N, K] of 4-bit codes, groups of g inputs, prefix `<module>.`, in the layout "gemm":

    qweight  I32 [K, N/8]        a word holds the codes of 8 outputs of one input
    qzeros   I32 [K/g, N/8]      likewise
    scales   F16 [K/g, N]

    word = | 7 | 5 | 3 | 1 | 6 | 4 | 2 | 0 |     (outputs; bit 31 … bit 0)

Source: WQLinear_GEMM of AutoAWQ 0.2.
"""

from typing import NamedTuple

from torch import Tensor

from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.dequantized import DequantizedCheckpoint, Read, check_parts, packed_words, read_section
from quantkit.numerics.affine import dequantize
from quantkit.numerics.packing import unpack

PER_WORD = 8
PLACES = [0, 4, 1, 5, 2, 6, 3, 7]  # of a word's outputs, in their order
READ = {"bits": (4,), "zero_point": (True,), "version": ("gemm", "GEMM"), "backend": ("autoawq",)}


class AwqWeights(NamedTuple):
    """One linear: qweight as stored; signed zero points and scales [K/g, N]."""

    qweight: Tensor
    zero_points_GN: Tensor
    scales_GN: Tensor

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the weight, float32 [stop − start, K]."""
        first, last = start // PER_WORD, -(-stop // PER_WORD)
        codes_KR = _unpack(self.qweight[:, first:last])[:, start % PER_WORD :][:, : stop - start]
        group_size = len(self.qweight) // len(self.scales_GN)
        tiles_GRg = codes_KR.reshape(-1, group_size, stop - start).transpose(1, 2)
        weights = dequantize(
            tiles_GRg, self.scales_GN[:, start:stop, None], self.zero_points_GN[:, start:stop, None]
        )
        return weights.transpose(0, 1).flatten(1)


class AwqLayout:
    """The linears of one checkpoint."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._group_size: int = read_section(checkpoint, READ)["group_size"]

    def shape(self, module: str) -> tuple[int, int]:
        """[N, K], with everything that stores it checked."""
        num_cols, num_words = packed_words(self._checkpoint, module)
        group_size = num_cols if self._group_size == -1 else self._group_size
        if num_cols % group_size:
            raise self._checkpoint.mismatch(
                f"{module} has {num_cols} inputs, which groups of {group_size} do not divide"
            )
        check_parts(self._checkpoint, module, num_cols // group_size, PER_WORD * num_words, num_words)
        return PER_WORD * num_words, num_cols

    def open(self, module: str, read: Read) -> AwqWeights:
        """Read one linear."""
        zero_points_GN = _unpack(read(f"{module}.qzeros"))
        return AwqWeights(read(f"{module}.qweight"), zero_points_GN, read(f"{module}.scales"))


def open_awq(checkpoint: Checkpoint) -> DequantizedCheckpoint:
    """An AWQ checkpoint as a model in 16 bits. Raises SourceError for a variant of the format that is not read."""
    return DequantizedCheckpoint(checkpoint, AwqLayout(checkpoint))


def _unpack(words: Tensor) -> Tensor:
    """int32 [R, W] to codes, int8 [R, 8·W], of which 8 is taken off: signed, as ours are."""
    codes = unpack(words, 4, PER_WORD * words.shape[1]).view(len(words), -1, PER_WORD)
    return codes[..., PLACES].flatten(1)
