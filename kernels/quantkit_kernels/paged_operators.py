"""Attention over pages as operators, for who compiles or traces; the runtime calls `paged_attention`.

Shape suffixes: T new tokens, Q query heads, D head dimension, and those of `paged_kv`.
"""

from typing import Any

from torch import Tensor

from quantkit_kernels import paged_kv
from quantkit_kernels.operators import operator
from quantkit_kernels.paged_kv import KVPool, Masking, Pages


def _fake(q_TQD: Tensor, *_: object) -> Tensor:
    return q_TQD.new_empty(q_TQD.shape)


def paged_decode(
    q_TQD: Tensor, pool: KVPool, pages: Pages, masking: Masking, *, split_tokens: int = 0
) -> Tensor:
    """Attention of at most 16 new tokens per sequence: [T, Q, D] in the dtype of q.

    split_tokens: 0 cuts contexts so as to fill the device; otherwise parts of that many tokens, which makes a
    sequence's result independent of what else is in the batch.
    """
    fields: tuple[Any, ...] = (*pool, *pages, *masking, split_tokens)
    return decode(q_TQD, *fields)


def _decode_cpu(q_TQD: Tensor, *fields: Any) -> Tensor:
    return paged_kv.attend_flat(q_TQD, *fields[:-1])  # nothing is split


@operator("paged_decode", cpu=_decode_cpu, fake=_fake)
def decode(
    q_TQD: Tensor,
    k_PHSD: Tensor,
    v_PHSD: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    block_table_BL: Tensor,
    lengths_B: Tensor,
    cu_seqlens_q: Tensor,
    max_q_len: int,
    max_context: int,
    softmax_scale: float,
    window: int,
    soft_cap: float,
    split_tokens: int,
) -> Tensor:
    """`paged_decode` with the fields of its arguments side by side, as an operator has to have them."""
    from quantkit_kernels import attention_decode

    pool = KVPool(k_PHSD, v_PHSD, k_scale, v_scale)
    pages = Pages(block_table_BL, lengths_B, cu_seqlens_q, max_q_len, max_context)
    return attention_decode.launch(q_TQD, pool, pages, Masking(softmax_scale, window, soft_cap), split_tokens)


def paged_prefill(q_TQD: Tensor, pool: KVPool, pages: Pages, masking: Masking) -> Tensor:
    """Attention of any number of new tokens per sequence: [T, Q, D] in the dtype of q."""
    fields: tuple[Any, ...] = (*pool, *pages, *masking)
    return prefill(q_TQD, *fields)


def _prefill_cpu(q_TQD: Tensor, *fields: Any) -> Tensor:
    return paged_kv.attend_flat(q_TQD, *fields)


@operator("paged_prefill", cpu=_prefill_cpu, fake=_fake)
def prefill(
    q_TQD: Tensor,
    k_PHSD: Tensor,
    v_PHSD: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    block_table_BL: Tensor,
    lengths_B: Tensor,
    cu_seqlens_q: Tensor,
    max_q_len: int,
    max_context: int,
    softmax_scale: float,
    window: int,
    soft_cap: float,
) -> Tensor:
    """`paged_prefill` with the fields of its arguments side by side, as an operator has to have them."""
    from quantkit_kernels import attention_prefill

    pool = KVPool(k_PHSD, v_PHSD, k_scale, v_scale)
    pages = Pages(block_table_BL, lengths_B, cu_seqlens_q, max_q_len, max_context)
    return attention_prefill.launch(q_TQD, pool, pages, Masking(softmax_scale, window, soft_cap))
