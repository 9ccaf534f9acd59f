"""What this machine does at most: bytes from memory, and multiplications. Everything else is a fraction of that.

On an H100 80GB: 3.1 TB/s read, 3.0 copied, 780 TFLOP/s in bf16, 1420 in FP8, 900 TOP/s in INT8. That of INT8 is what
`torch._int_mm` reaches, which can be beaten.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.bench.timing import Work, time_chain
from quantkit_kernels.dense import linear

FP8_CAPABILITY = (8, 9)


class Ceilings(NamedTuple):
    """Terabytes and tera-operations a second; None where the machine has no such instructions."""

    read: float
    copy: float
    bf16: float
    fp8: float | None
    int8: float | None

    def seconds(self, num_bytes: float, num_operations: float, input_dtype: torch.dtype) -> float:
        """The least that moving and multiplying take, each at its best, both at once."""
        rate = self.bf16
        if input_dtype == torch.float8_e4m3fn and self.fp8 is not None:
            rate = self.fp8
        if input_dtype == torch.int8 and self.int8 is not None:
            rate = self.int8
        return max(num_bytes / self.read, num_operations / rate) / 1e12


def measure_ceilings(device: torch.device) -> Ceilings:
    """A few seconds."""
    read, copy = _memory(device)
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    rate = 2 * side**3 / 1e6
    return Ceilings(
        read=read,
        copy=copy,
        bf16=rate / _us(lambda: linear(a, b), device),
        fp8=rate / _us(_fp8_product(a, b), device) if _has_fp8(device) else None,
        int8=rate / _us(_int8_product(a, b), device) if _has_int8(device) else None,
    )


def measure_read(device: torch.device) -> float:
    """Bytes a second that memory is read at."""
    return _memory(device)[0] * 1e12


def _memory(device: torch.device) -> tuple[float, float]:
    """Terabytes a second, read, and read and written; of pieces that no cache holds."""
    is_gpu = device.type == "cuda"
    source = torch.randint(0, 100, (1 << (30 if is_gpu else 26),), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    read = max(source.nbytes / _us(work, device) for work in _readers(source, is_gpu=is_gpu))
    copies: list[Work] = [lambda: target.copy_(source), lambda: torch.neg(source, out=target)]
    copy = max(2 * source.nbytes / _us(work, device) for work in copies)
    return read / 1e6, copy / 1e6


def _us(work: Work, device: torch.device) -> float:
    return time_chain([work] * (3 if device.type == "cuda" else 1), device)


def _readers(source: Tensor, *, is_gpu: bool) -> list[Work]:
    """Sums and products that read and hardly write: the fastest is what memory gives."""
    matrix = source.view(torch.bfloat16).view(-1, 8192)
    vector = torch.ones(8192, dtype=torch.bfloat16, device=source.device)
    readers: list[Work] = [lambda: source.view(torch.float32).sum(), source.amax]
    return [*readers, lambda: matrix @ vector] if is_gpu else readers


def _has_fp8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY


def _has_int8(device: torch.device) -> bool:
    return device.type == "cuda" or torch.cpu._is_vnni_supported()


def _fp8_product(a: Tensor, b: Tensor) -> Work:
    """One scale for all, sums that are not promoted: what the tensor cores give."""
    x, w = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    one = torch.ones((), device=x.device)
    return lambda: torch._scaled_mm(
        x, w.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def _int8_product(a: Tensor, b: Tensor) -> Work:
    x, w = ((30 * of).clamp(-128, 127).to(torch.int8) for of in (a, b))
    return lambda: torch._int_mm(x, w.T)
