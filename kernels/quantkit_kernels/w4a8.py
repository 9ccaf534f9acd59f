"""INT4 weights with INT8 or FP8 activations; the fewest rows go to `skinny`.

    y[m, n] = (Σ_g s_w[n, g] Σ_{k in g} (w[n, k] − z_w[n, g]) · x[m, k]  −  z_x[m] · r[n]) · s_x[m] + bias[n]

r is the sum of the dequantized row. The weight is a `StripWeight`, INT4 in fragment order, whatever the number of rows.

    route    rows, as `dispatch` has measured
    skinny   the fewest
    tile     from there: 8-bit codes made in registers (`w4a8_kernel`)
    wide     hundreds and thousands, on compute capability 9.0 (`wide_codes`)

With `batch_invariant` it is `tile` with tiles of one shape: an element is the same sum whatever else is in the batch.

Bound: half a byte per weight up to about 120 rows, then multiplications.
Shape suffixes: M rows, N out_features, K in_features, G groups.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantkit_kernels.batch_invariant import in_fixed_rows
from quantkit_kernels.capability import converts_float8
from quantkit_kernels.dispatch import choose
from quantkit_kernels.family import Family, Route
from quantkit_kernels.operands import (
    FLOAT32,
    FLOATS,
    check_bias,
    check_codes,
    check_fragments,
    check_part,
    check_scale_of_rows,
    check_scales,
)
from quantkit_kernels.operators import operator
from quantkit_kernels.skinny import MAX_ROWS, MIN_CAPABILITY
from quantkit_kernels.strip_weight import StripWeight, dense, prepare
from quantkit_kernels.w8a8_fp8 import few_rows
from quantkit_kernels.wide_codes import supports, wide_codes
from quantkit_kernels.wide_launch import CAPABILITY

CODES = (torch.int8, torch.float8_e4m3fn)


def multiply(
    codes_MK: Tensor,
    x_scale: Tensor,
    zero_point: Tensor | None,
    weight: StripWeight,
    bias_N: Tensor | None,
    out_dtype: torch.dtype,
    *,
    batch_invariant: bool = False,
) -> Tensor:
    """`w4a8` with a weight that `strip_weight.prepare` laid out; with zero points of x it needs `with_row_sum`."""
    assert weight.scale is not None, "a weight of 4 bits has scales"
    return w4a8(
        codes_MK, x_scale, zero_point, weight.stored, weight.scale, weight.zero_point, weight.row_sum, bias_N,
        weight.shape[0], weight.group_size, out_dtype, batch_invariant,
    )  # fmt: skip


def plain(
    codes_MK: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    packed: Tensor,
    w_scale: Tensor,
    w_zero_point: Tensor | None,
    w_row_sum_N: Tensor | None,
    bias_N: Tensor | None,
    num_outputs: int,
    group: int,
    out_dtype: torch.dtype,
    batch_invariant: bool = False,
) -> Tensor:
    """`w4a8` in plain torch: the weight dequantized, everything in float32."""
    num_rows, num_cols = codes_MK.shape
    check(
        codes_MK, x_scale, x_zero_point, packed, w_scale, w_zero_point, w_row_sum_N, bias_N, num_outputs, group,
        out_dtype,
    )  # fmt: skip
    weight = StripWeight(packed, w_scale, w_zero_point, None, (num_outputs, num_cols), 4, group)
    w_NK = dense(weight, torch.float32)
    if batch_invariant and num_rows > 0:
        y_MN = in_fixed_rows(lambda codes: codes.float() @ w_NK.T, codes_MK)
    else:
        y_MN = codes_MK.float() @ w_NK.T
    if x_zero_point is not None and w_row_sum_N is not None:
        y_MN -= x_zero_point.float() * w_row_sum_N
    y_MN *= x_scale
    return (y_MN if bias_N is None else y_MN.add_(bias_N)).to(out_dtype)


def _fake(
    codes_MK: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    packed: Tensor,
    w_scale: Tensor,
    w_zero_point: Tensor | None,
    w_row_sum_N: Tensor | None,
    bias_N: Tensor | None,
    num_outputs: int,
    group: int,
    out_dtype: torch.dtype,
    batch_invariant: bool = False,
) -> Tensor:
    return codes_MK.new_empty(codes_MK.shape[0], num_outputs, dtype=out_dtype)


@operator("w4a8", cpu=plain, fake=_fake)
def w4a8(
    codes_MK: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    packed: Tensor,
    w_scale: Tensor,
    w_zero_point: Tensor | None,
    w_row_sum_N: Tensor | None,
    bias_N: Tensor | None,
    num_outputs: int,
    group: int,
    out_dtype: torch.dtype,
    batch_invariant: bool = False,
) -> Tensor:
    """(x − zero point) · wᵀ (+ bias), [M, N] in out_dtype.

    codes_MK: int8 or float8_e4m3fn, columns contiguous. x_scale: float32 [M, 1] or [1]; x_zero_point: int8 of the same
    shape, or None, with int8 codes. packed, w_scale, w_zero_point, w_row_sum_N: of a `StripWeight`. group: 32, 64, 128,
    or 0 for a scale per row. bias_N: bf16, fp16 or fp32. batch_invariant: a row's result does not depend on how many
    others there are.
    """
    check(
        codes_MK, x_scale, x_zero_point, packed, w_scale, w_zero_point, w_row_sum_N, bias_N, num_outputs, group,
        out_dtype,
    )  # fmt: skip
    num_rows, num_cols = codes_MK.shape
    if num_rows == 0:
        return codes_MK.new_empty(0, num_outputs, dtype=out_dtype)
    if codes_MK.dtype == torch.float8_e4m3fn and not converts_float8(codes_MK.device):  # nor multiplies it
        return plain(
            codes_MK, x_scale, x_zero_point, packed, w_scale, w_zero_point, w_row_sum_N, bias_N, num_outputs, group,
            out_dtype, batch_invariant,
        )  # fmt: skip
    weight = StripWeight(packed, w_scale, w_zero_point, w_row_sum_N, (num_outputs, num_cols), 4, group)
    family = INT8_INPUT if codes_MK.dtype == torch.int8 else FP8_INPUT
    route = choose(family, num_rows, num_outputs, num_cols, codes_MK.device)
    run = partial(_tile, fixed=True) if batch_invariant else route.run
    return run(codes_MK, weight, x_scale=x_scale, zero_point=x_zero_point, bias_N=bias_N, out_dtype=out_dtype)


def _skinny(
    codes_MK: Tensor,
    weight: StripWeight,
    *,
    x_scale: Tensor,
    out_dtype: torch.dtype,
    zero_point: Tensor | None = None,
    bias_N: Tensor | None = None,
) -> Tensor:
    if out_dtype == torch.float32:  # skinny writes 16 bits
        return _tile(
            codes_MK, weight, x_scale=x_scale, zero_point=zero_point, bias_N=bias_N, out_dtype=out_dtype
        )
    return few_rows(
        codes_MK, weight, x_scale=x_scale, zero_point=zero_point, bias_N=bias_N, out_dtype=out_dtype
    )


def _tile(
    codes_MK: Tensor,
    weight: StripWeight,
    *,
    x_scale: Tensor,
    out_dtype: torch.dtype,
    zero_point: Tensor | None = None,
    bias_N: Tensor | None = None,
    fixed: bool = False,
) -> Tensor:
    """fixed: by tiles of one shape, whatever the number of rows."""
    from quantkit_kernels import w4a8_kernel

    assert weight.scale is not None, "a weight of 4 bits has scales"
    y_MN = codes_MK.new_empty(codes_MK.shape[0], weight.shape[0], dtype=out_dtype)
    shape = w4a8_kernel.fixed_shape(weight.group_size, codes_MK.device) if fixed else None
    w4a8_kernel.launch(
        codes_MK, x_scale, zero_point, weight.stored, weight.scale, weight.zero_point, weight.row_sum, bias_N,
        weight.group_size, y_MN, shape,
    )  # fmt: skip
    return y_MN


def _wide(codes_MK: Tensor, weight: StripWeight, *, out_dtype: torch.dtype, **more: Any) -> Tensor:
    run = partial(wide_codes, dependent=True) if supports(weight, out_dtype) else _tile
    return run(codes_MK, weight, out_dtype=out_dtype, **more)


SKINNY = Route(name="skinny", run=_skinny, max_rows=MAX_ROWS, min_capability=MIN_CAPABILITY)
WIDE = Route(name="wide", run=_wide, min_capability=CAPABILITY, max_capability=CAPABILITY)
INT8_INPUT = Family(
    name="w4a8_int8",
    routes=(SKINNY, WIDE, Route(name="tile", run=_tile)),
    prepare=prepare,
    weight_bytes=0.5,
    input_dtype=torch.int8,
)
FP8_INPUT = Family(
    name="w4a8_fp8",
    routes=(SKINNY, WIDE, Route(name="tile", run=_tile, min_capability=(8, 9))),
    prepare=prepare,
    weight_bytes=0.5,
    input_dtype=torch.float8_e4m3fn,
)


def check(
    codes_MK: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    packed: Tensor,
    w_scale: Tensor,
    w_zero_point: Tensor | None,
    w_row_sum_N: Tensor | None,
    bias_N: Tensor | None,
    num_outputs: int,
    group: int,
    out_dtype: torch.dtype,
) -> None:
    """What `w4a8` says about its operands."""
    check_codes(codes_MK, CODES, out_dtype)
    (num_rows, num_cols), device = codes_MK.shape, codes_MK.device
    check_scale_of_rows(x_scale, x_zero_point, num_rows, device)
    check_fragments(packed, num_outputs, num_cols, device)
    check_scales(w_scale, w_zero_point, num_outputs, num_cols, group, device)
    check_bias(bias_N, FLOATS, num_outputs, device)
    if x_zero_point is not None:
        assert codes_MK.dtype == torch.int8, "codes in e4m3 have no zero points"
        check_part("sums of the weight's rows", w_row_sum_N, FLOAT32, (num_outputs,), device)
