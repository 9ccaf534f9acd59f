"""What a device is and what kernels may use on it, asked once per device."""

import functools

import torch

HOPPER = (9, 0)


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a GPU; (0, 0) of a CPU."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    return major, minor


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """Of a GPU; 1 of a CPU, where the interpreter runs."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def starts_early(device: torch.device) -> bool:
    """Whether a kernel may start while the one before it ends, and then waits by itself (compute capability 9)."""
    return capability(device) >= HOPPER


def converts_float8(device: torch.device) -> bool:
    """Whether there are instructions from float32 to e4m3 (compute capability 8.9)."""
    return capability(device) >= (8, 9)
