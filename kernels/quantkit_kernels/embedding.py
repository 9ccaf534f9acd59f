"""Rows of a quantized embedding table, dequantized while they are gathered.

    packed  int32 [V, K · bits / 32]   as on disk: code + 2^(bits − 1), the first column in the lowest bits
    scale   bf16  [V, G]               one per K / G columns              ->   rows [T, K], code · scale (· multiplier)

Rounded after each product, as a model does that dequantizes its table and multiplies rows of it. A table of 16 bits is
`torch.nn.functional.embedding`'s business.

Shape suffixes: V vocab, K features, G groups of features that share a scale, T tokens.
"""

import torch
from torch import Tensor

from quantkit_kernels.operands import FLOATS
from quantkit_kernels.operators import operator


def embed(
    token_ids_T: Tensor, packed: Tensor, scale_VG: Tensor, num_features: int, bits: int, multiplier: float
) -> Tensor:
    """`embed_packed` in plain torch."""
    check(token_ids_T, packed, scale_VG, num_features, bits)
    assert not (token_ids_T < 0).any(), f"token ids from {int(token_ids_T.min())} on"
    ids = token_ids_T.long()
    words = packed[ids].unsqueeze(2) >> torch.arange(0, 32, bits, dtype=torch.int32)
    codes_TK = ((words & (2**bits - 1)) - 2 ** (bits - 1)).flatten(1)[:, :num_features]
    scale_TG = scale_VG[ids]
    tiles_TGK = codes_TK.to(scale_VG.dtype).unflatten(1, (scale_TG.shape[1], -1)) * scale_TG.unsqueeze(2)
    rows_TK: Tensor = tiles_TGK.flatten(1) * multiplier
    return rows_TK


def check(token_ids_T: Tensor, packed: Tensor, scale_VG: Tensor, num_features: int, bits: int) -> None:
    """What `embed_packed` says about its operands."""
    assert bits in (4, 8), f"codes of {bits} bits"
    assert packed.dtype == torch.int32 and packed.is_contiguous(), f"packed {packed.dtype} {packed.shape}"
    assert packed.shape[1] == -(-num_features * bits // 32), (
        f"{packed.shape[1]} words for {num_features} columns"
    )
    assert scale_VG.is_contiguous() and scale_VG.shape[0] == packed.shape[0], f"scale {scale_VG.shape}"
    assert num_features % scale_VG.shape[1] == 0, f"{num_features} columns in {scale_VG.shape[1]} groups"
    assert token_ids_T.ndim == 1 and token_ids_T.is_contiguous(), f"token ids {token_ids_T.shape}"
    assert token_ids_T.dtype in (torch.int32, torch.int64), f"token ids of {token_ids_T.dtype}"
    assert scale_VG.dtype in FLOATS, f"scale of {scale_VG.dtype}"


def _fake(
    token_ids_T: Tensor, packed: Tensor, scale_VG: Tensor, num_features: int, bits: int, multiplier: float
) -> Tensor:
    return scale_VG.new_empty(token_ids_T.shape[0], num_features)


@operator("embed_packed", cpu=embed, fake=_fake)
def embed_packed(
    token_ids_T: Tensor, packed: Tensor, scale_VG: Tensor, num_features: int, bits: int, multiplier: float
) -> Tensor:
    """Rows [T, num_features] of the table, in the dtype of the scale.

    token_ids_T: int32 or int64, inside the table. packed: int32, of 4 or 8 bits. multiplier: what the model multiplies
    its embeddings by, a number of the scale's dtype; 1 for most.
    """
    from quantkit_kernels import embedding_kernel

    return embedding_kernel.launch(token_ids_T, packed, scale_VG, num_features, bits, multiplier)
