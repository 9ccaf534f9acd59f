"""Products of hundreds to thousands of rows of 8-bit codes with INT4 weights: the host's side of `csrc/wide_codes.cu`.

Bound: the tensor cores at 8 bits; in groups, what scaling each group's sums takes, and reading x from L2.
Compute capability 9.0 alone (`wgmma`). No zero points of the weight, outputs of 16 bits: `w4a8` has another kernel too.
Shape suffixes: M rows, N out_features, K in_features.
"""

import torch
from torch import Tensor

from quantkit_kernels import nvrtc
from quantkit_kernels.strip_weight import KINDS, StripWeight
from quantkit_kernels.w8a8_fp8 import aligned
from quantkit_kernels.wide_launch import PARAMS, Tiling, defines_of, launch

X_SIZE = 1
TILING = Tiling(128)


def supports(weight: StripWeight, out_dtype: torch.dtype) -> bool:
    """Whether the kernel multiplies by this weight and writes this dtype."""
    return weight.bits == 4 and weight.zero_point is None and out_dtype in (torch.bfloat16, torch.float16)


def wide_codes(
    codes_MK: Tensor,
    weight: StripWeight,
    *,
    x_scale: Tensor,
    out_dtype: torch.dtype,
    zero_point: Tensor | None = None,
    bias_N: Tensor | None = None,
    dependent: bool = False,
) -> Tensor:
    """(x − zero point) · wᵀ (+ bias), [M, N], in out_dtype; see `w4a8`.

    dependent: start while the kernel in front still runs; it may not write the weight, which is read early in any case.
    """
    assert supports(weight, out_dtype), f"{weight.bits} bits, zero points or {out_dtype}"
    assert codes_MK.stride(1) == 1, "columns of x have to be next to each other"
    assert bias_N is None or bias_N.is_contiguous(), "biases have to be next to each other"
    num_rows = codes_MK.shape[0]
    y_MN = codes_MK.new_empty(num_rows, weight.shape[0], dtype=out_dtype)
    if num_rows == 0:
        return y_MN
    if codes_MK.stride(0) % 16 or codes_MK.data_ptr() % 16:
        codes_MK = aligned(codes_MK)
    defines = (
        *defines_of(weight, out_dtype, TILING, X_SIZE),
        ("IS_INT8", int(codes_MK.dtype == torch.int8)),
        ("BIAS_KIND", KINDS[torch.float32] if bias_N is None else KINDS[bias_N.dtype]),
    )
    zeros = (None, None) if zero_point is None else (zero_point.contiguous(), weight.row_sum)
    launch(
        nvrtc.load("wide_codes.cu", "wide_codes", PARAMS[X_SIZE], defines),
        codes_MK,
        y_MN,
        weight,
        bias_N,
        TILING,
        more_tensors=(x_scale.contiguous(), *zeros),
        more_numbers=(int(x_scale.numel() > 1),),
        dependent=dependent,
    )
    return y_MN
