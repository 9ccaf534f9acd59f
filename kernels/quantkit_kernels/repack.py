"""INT4 codes into fragment order, scales and zero points into strips: what the kernels in CUDA C++ read.

    packed  int32 [N / 16, K / 64, 32, 4]     docs/kernels.md draws it
    scales  [N / 16, G, 16]                   one strip's scales of one group side by side

Rows are padded to a multiple of 16 and columns to one of 64, with code 0 and scale 0.
Shape suffixes: N out_features, K in_features, G groups, R scale rows.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

STRIP_ROWS, BLOCK_COLUMNS = 16, 64


def to_fragments(codes_NK: Tensor) -> Tensor:
    """INT4 codes, int8 in -8..7 [N, K], to int32 [ceil(N / 16), ceil(K / 64), 32, 4]."""
    num_rows, num_cols = codes_NK.shape
    padded = pad(codes_NK, (0, -num_cols % BLOCK_COLUMNS, 0, -num_rows % STRIP_ROWS))
    strips, blocks = padded.shape[0] // STRIP_ROWS, padded.shape[1] // BLOCK_COLUMNS
    # strip, row / 8, row % 8 (g); block, half (h), t, word of the half, and of four columns: high, low bit
    codes = padded.view(strips, 2, 8, blocks, 2, 4, 2, 2, 2)
    words = torch.zeros(strips, 8, blocks, 2, 4, 2, dtype=torch.int32, device=codes_NK.device)
    for below in range(2):
        for high in range(2):
            for low in range(2):
                nibble = (codes[:, below, :, :, :, :, :, high, low] + 8).to(torch.int32)
                words |= nibble << (4 * (4 * low + 2 * high + below))
    return words.permute(0, 2, 1, 4, 3, 5).reshape(strips, blocks, 32, 4).contiguous()


def from_fragments(packed: Tensor, num_rows: int, num_cols: int) -> Tensor:
    """The codes again, int8 [N, K]."""
    strips, blocks = packed.shape[:2]
    words = packed.view(strips, blocks, 8, 4, 2, 2).permute(0, 2, 1, 4, 3, 5)
    codes = torch.empty(strips, 2, 8, blocks, 2, 4, 2, 2, 2, dtype=torch.int8, device=packed.device)
    for below in range(2):
        for high in range(2):
            for low in range(2):
                nibble = (words >> (4 * (4 * low + 2 * high + below))) & 15
                codes[:, below, :, :, :, :, :, high, low] = nibble.to(torch.int8) - 8
    return codes.view(strips * STRIP_ROWS, blocks * BLOCK_COLUMNS)[:num_rows, :num_cols]


def to_strips(values_RG: Tensor, tile: tuple[int, int], num_rows: int) -> Tensor:
    """Scales or zero points of tiles, [R, G], to [ceil(N / 16), G, 16]; tiles of several rows are repeated."""
    of_row = torch.arange(num_rows, device=values_RG.device) // tile[0]
    values_NG = pad(values_RG[of_row], (0, 0, 0, -num_rows % STRIP_ROWS))
    return values_NG.view(-1, STRIP_ROWS, values_RG.shape[1]).transpose(1, 2).contiguous()


def from_strips(values: Tensor, num_rows: int) -> Tensor:
    """[N / 16, G, 16] to [N, G]."""
    return values.transpose(1, 2).reshape(-1, values.shape[1])[:num_rows]
