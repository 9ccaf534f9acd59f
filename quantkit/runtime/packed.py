"""Lists of integers on their way to the device, packed: one copy, for which nobody waits.

    pinned   | part 0 | pad | part 1 | pad | …          each part starts at a multiple of 128 bytes
    device   the same, in one tensor; parts are views of it

Each copy has pinned memory of its own, which torch gives to nobody else before the copy has been made.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

ALIGNMENT = 32  # of int32: compiled kernels tell pointers at multiples of 16 bytes from others


def send(parts: Sequence[Sequence[int]], device: torch.device) -> list[Tensor]:
    """Each part as an int32 tensor on the device."""
    starts = [0, *accumulate(-(-len(part) // ALIGNMENT) * ALIGNMENT for part in parts)]
    sent = _packed(parts, starts, device).to(device, non_blocking=True)
    return [sent[start : start + len(part)] for start, part in zip(starts, parts, strict=False)]


def fill(out_PW: Tensor, parts: Sequence[Sequence[int]]) -> None:
    """The parts into the beginnings of the rows of an int32 tensor on the device; what follows them is anything."""
    num_rows, width = out_PW.shape
    host = _packed(parts, list(range(0, num_rows * width + 1, width)), out_PW.device)
    out_PW.copy_(host.view(out_PW.shape), non_blocking=True)


def _packed(parts: Sequence[Sequence[int]], starts: Sequence[int], device: torch.device) -> Tensor:
    host = torch.empty(starts[-1], dtype=torch.int32, pin_memory=device.type == "cuda")
    array = host.numpy()
    for start, part in zip(starts, parts, strict=False):
        array[start : start + len(part)] = part
    return host
