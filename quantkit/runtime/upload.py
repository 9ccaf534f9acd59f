"""Small numbers from the host to the device, without waiting for it."""

from typing import Any

import torch
from torch import Tensor


def upload(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of nested lists of numbers, there once the stream gets to it.

    To a GPU through pinned memory of its own, which torch gives to nobody else before the copy has been made.
    """
    host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)
