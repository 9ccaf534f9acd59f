"""How far one model's next-token predictions are from another's: KL divergence, log-probabilities, choices.

Works on rows of logits where they lie, a chunk at a time in float32 with sums in float64, so that temporaries stay
small where V is large. KL is in nats, KL(reference ‖ candidate) = Σ p (log p − log q).

Shape suffixes: R rows of a chunk, V vocabulary.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_ELEMENTS = {
    "cpu": 1 << 20,  # with more, malloc keeps hundreds of MB between windows
    "cuda": 1 << 24,  # with less, launches take longer than what they launch
}


def row_chunks(num_rows: int, vocab_size: int, device: torch.device) -> Iterator[slice]:
    """Slices of rows that cover [0, num_rows), each of about 4 MB in float32 on a CPU, 64 MB on a GPU."""
    step = max(1, CHUNK_ELEMENTS[device.type] // vocab_size)
    return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))


class Divergence(NamedTuple):
    """Per row: KL of the candidate to the reference (nats), and the candidate's own log-probability and choice."""

    kl_R: Tensor
    log_prob_R: Tensor
    top1_R: Tensor


def divergence(reference_RV: Tensor, candidate_RV: Tensor, targets_R: Tensor) -> Divergence:
    """Compare finite logits row by row; each side may be shifted by any constant per row.

    Both float [R, V]; targets int64 [R], the tokens whose log-probability is asked for. Returns float64 [R] twice
    and int64 [R]. Temporaries: four float32 [R, V].
    """
    p_log_RV = _below_max(reference_RV)
    q_log_RV = _below_max(candidate_RV)
    q_norm_R = _log_sum_exp(q_log_RV)
    target_R = q_log_RV.gather(-1, targets_R.unsqueeze(-1)).squeeze(-1).double()
    p_RV = p_log_RV.exp()
    p_sum_R = p_RV.sum(dim=-1, dtype=torch.float64)
    cross_R = p_RV.mul_(p_log_RV.sub_(q_log_RV)).sum(dim=-1, dtype=torch.float64)
    kl_R = (cross_R / p_sum_R - p_sum_R.log() + q_norm_R).clamp(min=0)  # below 0 only by rounding
    return Divergence(kl_R, target_R - q_norm_R, candidate_RV.argmax(dim=-1))


def log_probs(logits_RV: Tensor, targets_R: Tensor) -> Tensor:
    """Log-probability of one token per row, float64 [R]."""
    shifted_RV = _below_max(logits_RV)
    target_R = shifted_RV.gather(-1, targets_R.unsqueeze(-1)).squeeze(-1).double()
    return target_R - _log_sum_exp(shifted_RV)


def _below_max(logits_RV: Tensor) -> Tensor:
    logits_RV = logits_RV.float()
    return logits_RV - logits_RV.amax(dim=-1, keepdim=True)


def _log_sum_exp(shifted_RV: Tensor) -> Tensor:
    return shifted_RV.exp().sum(dim=-1, dtype=torch.float64).log()
