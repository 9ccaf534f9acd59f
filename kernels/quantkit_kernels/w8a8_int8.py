"""INT8 weights with INT8 activations: an integer product, then the zero point and two scales.

    y[m, n] = (Σ_k x[m, k] · w[n, k]  −  z_x[m] · Σ_k w[n, k]) · s_w[n] · s_x[m] + bias[n]

Scale and zero point of x: one for each token, or one for all. Codes stay row-major, [N, K] as on disk, columns padded
with zeros to a multiple of 16; the sums of rows are made once. Few rows go to `stream` (Hopper) or `skinny`, all others
to `tile`: sums stay in registers, where `torch._int_mm` would write them out and read them again.

|Σ (x − z) · w| ≤ K · 255 · 128 stays below 2^31 for K < 2^16. `stream` and `tile` take the zero point off that,
exactly; in `skinny` each warp's sum, of an eighth of the columns, becomes float32 before. With `batch_invariant` it is
`tile`: exact sums are the same in tiles of any shape.
Bound: a byte per weight up to about 240 rows, then multiplications.
Shape suffixes: M rows, N out_features, K in_features.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from quantkit_kernels import byte_stream
from quantkit_kernels.dispatch import choose
from quantkit_kernels.family import Family, Route
from quantkit_kernels.operands import (
    FLOAT32,
    FLOATS,
    INT8,
    INT32,
    check_bias,
    check_codes,
    check_part,
    check_rows,
    check_scale_of_rows,
)
from quantkit_kernels.operators import operator
from quantkit_kernels.skinny import MAX_ROWS, MIN_CAPABILITY
from quantkit_kernels.strip_weight import StripWeight
from quantkit_kernels.w8a8_fp8 import aligned, few_rows
from quantkit_kernels.weight import LinearWeight

MAX_COLS = 1 << 16
EXACT_COLS = 1 << 10  # sums of so many products are exact in float32


class Int8Weight(NamedTuple):
    """codes_NK: int8, columns padded. scale_N: float32. code_sum_N: int32, of each row; row_sum_N: times its scale."""

    codes_NK: Tensor
    scale_N: Tensor
    code_sum_N: Tensor
    row_sum_N: Tensor


def prepare(weight: LinearWeight) -> Int8Weight:
    """Pad columns where they ask for it, and sum the codes of each row for zero points."""
    num_rows, num_cols = weight.codes_NK.shape
    assert num_cols < MAX_COLS, f"sums over {num_cols} columns may overflow"
    of_row = torch.arange(num_rows, device=weight.codes_NK.device) // weight.tile[0]
    scale = weight.scale_RG.float()[of_row, 0].contiguous()
    code_sum = weight.codes_NK.sum(dim=1, dtype=torch.int32)
    return Int8Weight(aligned(weight.codes_NK), scale, code_sum, code_sum * scale)


def multiply(
    codes_MK: Tensor,
    x_scale: Tensor,
    zero_point: Tensor | None,
    weight: Int8Weight,
    bias_N: Tensor | None,
    out_dtype: torch.dtype,
    *,
    batch_invariant: bool = False,
) -> Tensor:
    """`w8a8_int8` with a prepared weight."""
    return w8a8_int8(codes_MK, x_scale, zero_point, *weight, bias_N, out_dtype, batch_invariant)


def plain(
    codes_MK: Tensor,
    x_scale: Tensor,
    zero_point: Tensor | None,
    w_codes_NK: Tensor,
    w_scale_N: Tensor,
    w_code_sum_N: Tensor,
    w_row_sum_N: Tensor,
    bias_N: Tensor | None,
    out_dtype: torch.dtype,
    batch_invariant: bool = False,
) -> Tensor:
    """`w8a8_int8` in plain torch: exact sums, the same in any batch.

    Without VNNI the CPU's integer products may saturate: float32, few enough columns.
    """
    weight = Int8Weight(w_codes_NK, w_scale_N, w_code_sum_N, w_row_sum_N)
    _check(codes_MK, x_scale, zero_point, weight, bias_N, out_dtype)
    codes_MK = aligned(codes_MK)
    if torch.cpu._is_vnni_supported():
        sums_MN = torch._int_mm(codes_MK, w_codes_NK.T)
    else:
        sums_MN = torch.zeros(len(codes_MK), len(w_codes_NK), dtype=torch.int32)
        for start in range(0, codes_MK.shape[1], EXACT_COLS):
            part = slice(start, start + EXACT_COLS)
            sums_MN += (codes_MK[:, part].float() @ w_codes_NK[:, part].float().T).to(torch.int32)
    if zero_point is not None:
        sums_MN -= zero_point.to(torch.int32) * w_code_sum_N
    y_MN = sums_MN.float().mul_(x_scale).mul_(w_scale_N)
    return (y_MN if bias_N is None else y_MN.add_(bias_N)).to(out_dtype)


def _fake(
    codes_MK: Tensor,
    x_scale: Tensor,
    zero_point: Tensor | None,
    w_codes_NK: Tensor,
    w_scale_N: Tensor,
    w_code_sum_N: Tensor,
    w_row_sum_N: Tensor,
    bias_N: Tensor | None,
    out_dtype: torch.dtype,
    batch_invariant: bool = False,
) -> Tensor:
    return codes_MK.new_empty(codes_MK.shape[0], w_scale_N.shape[0], dtype=out_dtype)


@operator("w8a8_int8", cpu=plain, fake=_fake)
def w8a8_int8(
    codes_MK: Tensor,
    x_scale: Tensor,
    zero_point: Tensor | None,
    w_codes_NK: Tensor,
    w_scale_N: Tensor,
    w_code_sum_N: Tensor,
    w_row_sum_N: Tensor,
    bias_N: Tensor | None,
    out_dtype: torch.dtype,
    batch_invariant: bool = False,
) -> Tensor:
    """(x − zero point) · wᵀ (+ bias), [M, N] in out_dtype.

    codes_MK: int8, columns contiguous. x_scale: float32 [M, 1] or [1]. zero_point: int8 of the same shape, or None.
    w_codes_NK, w_scale_N, w_code_sum_N, w_row_sum_N: of an `Int8Weight`. bias_N: bf16, fp16 or fp32. batch_invariant: a
    row's result does not depend on how many others there are.
    """
    weight = Int8Weight(w_codes_NK, w_scale_N, w_code_sum_N, w_row_sum_N)
    _check(codes_MK, x_scale, zero_point, weight, bias_N, out_dtype)
    (num_rows, num_cols), num_outputs = codes_MK.shape, w_scale_N.shape[0]
    if num_rows == 0:
        return codes_MK.new_empty(0, num_outputs, dtype=out_dtype)
    route = choose(FAMILY, num_rows, num_outputs, num_cols, codes_MK.device)
    run = _tile if batch_invariant else route.run
    return run(codes_MK, weight, x_scale=x_scale, zero_point=zero_point, bias_N=bias_N, out_dtype=out_dtype)


def _stream(
    codes_MK: Tensor,
    weight: Int8Weight,
    *,
    x_scale: Tensor,
    out_dtype: torch.dtype,
    zero_point: Tensor | None = None,
    bias_N: Tensor | None = None,
) -> Tensor:
    return byte_stream.stream(
        aligned(codes_MK),
        weight.codes_NK,
        weight.scale_N,
        num_outputs=weight.scale_N.shape[0],
        out_dtype=out_dtype,
        x_scale=x_scale,
        bias_N=bias_N,
        zero_point=None if zero_point is None else zero_point.contiguous(),
        code_sum_N=weight.code_sum_N,
    )


def _skinny(
    codes_MK: Tensor,
    weight: Int8Weight,
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
    shape = (weight.scale_N.shape[0], codes_MK.shape[1])
    rows = StripWeight(weight.codes_NK, weight.scale_N, None, weight.row_sum_N, shape, 8, 0)
    return few_rows(
        codes_MK, rows, x_scale=x_scale, zero_point=zero_point, bias_N=bias_N, out_dtype=out_dtype
    )


def _tile(
    codes_MK: Tensor,
    weight: Int8Weight,
    *,
    x_scale: Tensor,
    out_dtype: torch.dtype,
    zero_point: Tensor | None = None,
    bias_N: Tensor | None = None,
) -> Tensor:
    from quantkit_kernels import byte_tile_kernel

    num_rows, num_outputs = codes_MK.shape[0], weight.scale_N.shape[0]
    y_MN = torch.empty(num_rows, num_outputs, dtype=out_dtype, device=codes_MK.device)
    byte_tile_kernel.multiply(
        aligned(codes_MK), x_scale, weight.codes_NK, weight.scale_N, y_MN,
        bias_N=bias_N, zero_point=zero_point, code_sum_N=weight.code_sum_N,
    )  # fmt: skip
    return y_MN


FAMILY = Family(
    name="w8a8_int8",
    routes=(
        Route(
            name="stream",
            run=_stream,
            max_rows=byte_stream.MAX_ROWS,
            min_capability=byte_stream.CAPABILITY,
            max_capability=byte_stream.CAPABILITY,
        ),
        Route(name="skinny", run=_skinny, max_rows=MAX_ROWS, min_capability=MIN_CAPABILITY),
        Route(name="tile", run=_tile),
    ),
    prepare=prepare,
    weight_bytes=1,
    input_dtype=torch.int8,
)


def _check(
    codes_MK: Tensor,
    x_scale: Tensor,
    zero_point: Tensor | None,
    weight: Int8Weight,
    bias_N: Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    check_codes(codes_MK, INT8, out_dtype)
    (num_rows, num_cols), device = codes_MK.shape, codes_MK.device
    check_scale_of_rows(x_scale, zero_point, num_rows, device)
    num_outputs = check_rows(weight.codes_NK, INT8, num_cols, device)
    check_part("scales", weight.scale_N, FLOAT32, (num_outputs,), device)
    check_bias(bias_N, FLOATS, num_outputs, device)
    if zero_point is not None:
        check_part("sums of codes", weight.code_sum_N, INT32, (num_outputs,), device)
        check_part("sums of rows", weight.row_sum_N, FLOAT32, (num_outputs,), device)
