"""Log probabilities of tokens: of the logits as the model made them, before temperature, filters and adjustments.

Shape suffixes: B rows, V vocab, L likeliest tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from quantkit_kernels.sampling import topk

ROWS_AT_ONCE = 32  # of float32 intermediates, [rows, V]


class TokenLogprobs(NamedTuple):
    """Of one token: its log probability, its rank from 1 on, and the likeliest tokens with theirs."""

    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]


class Logprobs(NamedTuple):
    """Those of a step, on the device: float32 [B], int64 [B], int64 [B, L], float32 [B, L]."""

    logprob_B: Tensor
    rank_B: Tensor
    top_ids_BL: Tensor
    top_logprobs_BL: Tensor

    def of_tokens(self) -> list[TokenLogprobs]:
        """On the host, a row each; waits for the device."""
        return [TokenLogprobs(*each) for each in zip(*(tensor.tolist() for tensor in self), strict=True)]


def logprobs_of(logits_BV: Tensor, token_ids_B: Tensor, num_likeliest: int) -> Logprobs:
    """Of the chosen tokens and of the likeliest, some rows at a time."""
    parts = [slice(start, start + ROWS_AT_ONCE) for start in range(0, len(logits_BV), ROWS_AT_ONCE)]
    each = [_of_part(logits_BV[part], token_ids_B[part], num_likeliest) for part in parts]
    return Logprobs(*(torch.cat(tensors) for tensors in zip(*each, strict=True)))


def _of_part(logits_BV: Tensor, token_ids_B: Tensor, num_likeliest: int) -> Logprobs:
    logits_BV = logits_BV.float()
    total_B1 = logits_BV.logsumexp(dim=1, keepdim=True)
    chosen_B1 = logits_BV.gather(1, token_ids_B[:, None])
    rank_B = 1 + (logits_BV > chosen_B1).sum(dim=1)
    if num_likeliest:
        top_BL, top_ids_BL = topk(logits_BV, min(num_likeliest, logits_BV.shape[1]))
    else:
        top_BL, top_ids_BL = logits_BV[:, :0], token_ids_B[:, None][:, :0]
    return Logprobs((chosen_B1 - total_B1)[:, 0], rank_B, top_ids_BL, top_BL - total_B1)
