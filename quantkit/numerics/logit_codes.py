"""Logits in 16 bits per entry, for keeping a model's predictions on disk.

Softmax sees only differences, so a row is stored as its distance below its maximum, on a grid of 2^16 steps:

    max − logit ≈ code · step,     step = min(max − min, RANGE) / 65535,     code in 0 … 65535

Entries more than RANGE = 40 nats below the maximum are stored as 40 below; all of them together hold less
than V · e^−40 of the probability (2e−12 for V = 500 000). Every other entry is off by at most step / 2, so by
Hoeffding's lemma KL(exact ‖ stored) <= step² / 8 <= 4.7e−8, and any KL(stored ‖ q) differs from
KL(exact ‖ q) by about step · Σ p |log p/q| at the very worst, with random sign, so far less after averaging.

Shape suffixes: T positions, R rows of a chunk, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

RANGE = 40.0
TOP_CODE = 65535
OFFSET = 32768  # codes are stored as int16


class LogitCodes(NamedTuple):
    """Rows of logits: codes_TV int16 (code − 32768), step_T float32, in nats."""

    codes_TV: Tensor
    step_T: Tensor


def encode_logits(logits_RV: Tensor) -> LogitCodes:
    """Codes of finite logits, any float dtype, on their device; temporaries: two float32 [R, V]."""
    logits_RV = logits_RV.float()
    low_R, high_R = logits_RV.aminmax(dim=-1)
    step_R = ((high_R - low_R).clamp(max=RANGE) / TOP_CODE).clamp(min=torch.finfo(torch.float32).tiny)
    below_RV = high_R.unsqueeze(-1) - logits_RV
    below_RV /= step_R.unsqueeze(-1)
    codes_RV = below_RV.round_().clamp_(max=TOP_CODE).sub_(OFFSET).to(torch.int16)
    return LogitCodes(codes_RV, step_R)


def decode_logits(codes: LogitCodes, rows: slice, device: torch.device) -> Tensor:
    """Some rows as float32 [R, V] on a device, shifted so that each row's maximum is 0."""
    below_RV = codes.codes_TV[rows].to(device).float().add_(OFFSET)
    return below_RV.mul_(-codes.step_T[rows].to(device).unsqueeze(-1))
