"""What a device's Triton kernels may use, asked once per device."""

import functools

import torch


@functools.cache
def starts_early(device: torch.device) -> bool:
    """Whether a kernel may start while the one before it ends, and then waits by itself (compute capability 9)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def converts_float8(device: torch.device) -> bool:
    """Whether there are instructions from float32 to e4m3 (compute capability 8.9)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
