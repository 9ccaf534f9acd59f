"""The largest logits of every row: the greedy token, and the top k that a sampler looks at.

The order is total: larger values first, of equal ones the lower index, NaN before everything.

Shape suffixes: B rows, V vocab, K kept.
"""

import torch
from torch import Tensor

from quantkit_kernels.operators import operator

MAX_KEPT = 128


def check(logits_BV: Tensor, num_kept: int = 1) -> None:
    """What `topk` says about its operands."""
    assert logits_BV.ndim == 2 and logits_BV.stride(1) == 1, (
        f"logits {logits_BV.shape} by {logits_BV.stride()}"
    )
    assert 0 < num_kept <= min(MAX_KEPT, logits_BV.shape[1]), f"{num_kept} of {logits_BV.shape[1]} logits"


def _argmax(logits_BV: Tensor) -> tuple[Tensor, Tensor]:
    check(logits_BV)
    tokens_B = logits_BV.argmax(dim=1)
    return tokens_B, logits_BV.gather(1, tokens_B[:, None])[:, 0].isnan()


def _fake_argmax(logits_BV: Tensor) -> tuple[Tensor, Tensor]:
    num_rows = logits_BV.shape[0]
    return logits_BV.new_empty(num_rows, dtype=torch.int64), logits_BV.new_empty(num_rows, dtype=torch.bool)


@operator("argmax", cpu=_argmax, fake=_fake_argmax)
def argmax(logits_BV: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the largest logit of each row, the lowest of equal ones, int64 [B]; and whether it is NaN, bool [B].

    logits_BV: any float dtype, rows contiguous.
    """
    from quantkit_kernels import sampling_kernel

    return sampling_kernel.launch_argmax(logits_BV)


def _topk(logits_BV: Tensor, num_kept: int) -> tuple[Tensor, Tensor]:
    check(logits_BV, num_kept)
    values, order = logits_BV.float().sort(dim=1, descending=True, stable=True)
    return values[:, :num_kept].clone(), order[:, :num_kept].clone()


def _fake_topk(logits_BV: Tensor, num_kept: int) -> tuple[Tensor, Tensor]:
    shape = (logits_BV.shape[0], num_kept)
    return logits_BV.new_empty(shape, dtype=torch.float32), logits_BV.new_empty(shape, dtype=torch.int64)


@operator("topk", cpu=_topk, fake=_fake_topk)
def topk(logits_BV: Tensor, num_kept: int) -> tuple[Tensor, Tensor]:
    """The largest logits of each row, float32 [B, num_kept], and their indices, int64: in order, ties by index.

    num_kept: at most 128 and V.
    """
    from quantkit_kernels import sampling_kernel

    return sampling_kernel.launch_topk(logits_BV, num_kept)
