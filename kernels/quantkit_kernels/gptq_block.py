"""GPTQ within a block of columns.

    H + damping = L · Lᵀ; from the last column to the first:

    target[c] = w[c] + (carried[c] + Σ_{j>c} lost[j] · L[j, c]) / L[c, c]
    code[c]   = round(target[c] / scale + zero_point)          ŵ[c] = (code[c] − zero_point) · scale
    lost[c]   = w[c] − ŵ[c]

`carried` holds what the blocks behind have lost; the caller adds lost · L to that of the blocks before, as one matrix
product. No inverse of H is needed. On a CPU the caller has loops of its own.

Shape suffixes: B batches, C columns (at most 128), N out_features, G groups. Source: arXiv:2210.17323.
"""

import torch
from torch import Tensor

from quantkit_kernels.operators import operator


def _fake(
    w_BCN: Tensor,
    carried_BCN: Tensor,
    lower_BCC: Tensor,
    scale_BGN: Tensor,
    zero_point_BGN: Tensor | None,
    group_C: Tensor,
    qmin: int,
    qmax: int,
    is_float8: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, num_rows = w_BCN.shape
    lost_BCN = w_BCN.new_empty(w_BCN.shape, dtype=torch.float32)
    return (
        w_BCN.new_empty(w_BCN.shape, dtype=torch.int8),
        lost_BCN,
        lost_BCN.new_empty(batch, num_rows),
    )


@operator("gptq_block", cpu=None, fake=_fake)
def gptq_block(
    w_BCN: Tensor,
    carried_BCN: Tensor,
    lower_BCC: Tensor,
    scale_BGN: Tensor,
    zero_point_BGN: Tensor | None,
    group_C: Tensor,
    qmin: int,
    qmax: int,
    is_float8: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Round a block of columns: codes [B, C, N], what they lost, float32 [B, C, N], and the loss, float32 [B, N].

    w_BCN: any float dtype. carried_BCN: float32, what the blocks behind add. lower_BCC: float32, the diagonal block of
    L. scale_BGN: in its dtype on disk; zero_point_BGN: int8, or None. group_C: int, the scale's row for each column.
    qmin, qmax: of the codes; with is_float8 they are ignored, and codes are the bytes of e4m3 values.
    The loss is Σ ((target − ŵ) · L[c, c])², the block's part of (W − Ŵ) (H + damping) (W − Ŵ)ᵀ.
    """
    from quantkit_kernels import gptq_block_kernel

    return gptq_block_kernel.launch(
        w_BCN, carried_BCN, lower_BCC, scale_BGN, zero_point_BGN, group_C, qmin, qmax, is_float8
    )
