"""INT8 weights with INT8 activations: an exact integer product, then two scales.

    y[m, n] = (Σ_k x[m, k] · w[n, k]  −  z_x · Σ_k w[n, k]) · s_x[m] · s_w[n]

`torch._int_mm` sums in int32; |Σ (x − z) · w| ≤ K · 255 · 128 stays below 2^31 for K < 2^16. Without VNNI
instructions the CPU library may saturate partial sums at 16 bits, so there the weight is dequantized instead. So it is
with float32 activations: that is the reference computation, whose logits have to be those of transformers, and any
other order of summation moves some inputs of the next layer across a rounding boundary (amax / 127.5 puts the largest
one on such a boundary).

Bound: one byte per weight, and several times the multiply rate of the dense product.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from quantkit_kernels.weight import LinearWeight

MAX_COLS = 1 << 16


class Int8Int8(NamedTuple):
    """Codes [N, K] as they are, float32 scale per row, sum of the codes of each row."""

    codes_NK: Tensor
    scale_N: Tensor
    code_sum_N: Tensor


def supports(weight: LinearWeight, dtype: torch.dtype) -> bool:
    """INT8 symmetric with one scale per row, 16-bit activations, on a CPU whose integer products are exact."""
    is_int8 = weight.bits == 8 and weight.codes_NK.dtype == torch.int8 and weight.zero_point_RG is None
    return (
        is_int8
        and weight.is_per_row
        and weight.codes_NK.shape[1] < MAX_COLS
        and dtype in (torch.bfloat16, torch.float16)
        and torch.cpu._is_vnni_supported()
    )


def prepare(weight: LinearWeight, dtype: torch.dtype) -> Int8Int8:
    """Keep the codes; sum them by row for the activations' zero point."""
    num_rows = weight.codes_NK.shape[0]
    scale = weight.scale_RG.float().expand(num_rows, 1)[:, 0].contiguous()
    return Int8Int8(weight.codes_NK.contiguous(), scale, weight.codes_NK.sum(dim=1, dtype=torch.int32))


def run(codes_MK: Tensor, scale: Tensor, zero_point: Tensor | None, weight: Int8Int8) -> Tensor:
    """Product of the quantized input, float32 [M, N].

    codes_MK: int8. scale: [M, 1] or [1]. zero_point: int8 [1], or None.
    """
    sums_MN = torch._int_mm(codes_MK.contiguous(), weight.codes_NK.T)
    if zero_point is not None:
        sums_MN -= zero_point.to(torch.int32) * weight.code_sum_N
    return sums_MN.float().mul_(scale.float()).mul_(weight.scale_N)
