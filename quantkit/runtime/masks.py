"""Tokens that rows may not take, filled with −inf before they are drawn.

Shape suffixes: B rows of a step, M of them with a mask, V vocab, W words of 32 tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.runtime.upload import upload

ROWS_AT_ONCE = 32  # of bytes [rows, V]


class Masks(NamedTuple):
    """Of the rows that have one: their places in the step, int64 [M], and int32 [M, W], a bit for each token."""

    place_M: Tensor
    mask_MW: Tensor

    @classmethod
    def of(cls, masks: Sequence[Tensor | None], device: torch.device) -> "Masks | None":
        """Those of a step's rows, on their way to the device; None: no row has one."""
        places = [place for place, mask in enumerate(masks) if mask is not None]
        if not places:
            return None
        mask_MW = torch.stack([mask for mask in masks if mask is not None])
        if device.type == "cuda":
            mask_MW = mask_MW.pin_memory()
        return cls(upload(places, torch.int64, device), mask_MW.to(device, non_blocking=True))


def masked(logits_BV: Tensor, masks: Masks) -> Tensor:
    """The logits, −inf where a mask forbids a token, in a tensor of its own; rows without a mask as they are."""
    masked_BV = logits_BV.clone()
    bit = torch.arange(8, dtype=torch.uint8, device=logits_BV.device)
    for start in range(0, len(masks.place_M), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        place_M = masks.place_M[part]
        byte_MW = masks.mask_MW[part].view(torch.uint8)
        is_allowed_MV = (byte_MW[:, :, None] >> bit & 1).flatten(1)[:, : logits_BV.shape[1]].bool()
        masked_BV[place_M] = logits_BV[place_M].masked_fill(~is_allowed_MV, -torch.inf)
    return masked_BV
