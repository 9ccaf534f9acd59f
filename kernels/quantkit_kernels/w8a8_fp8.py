"""FP8 e4m3 weights with FP8 activations.

    y[m, n] = (Σ_k x[m, k] · w[n, k]) · s_x[m] · s_w[n] + bias[n]                                scales per row
    y[m, n] = Σ_b (Σ_{k in b} x[m, k] · w[n, k]) · s_x[m, b] · s_w[n / 128, b] + bias[n]         blocks of 128

Codes stay row-major, [N, K] as on disk, columns and rows padded with zeros to a multiple of 16 (what cuBLAS and tensor
maps ask for). A scale for the whole weight is repeated for its rows; one for all tokens may be one number.

    route       rows, as `dispatch` has measured
    stream      few, on Hopper
    skinny      the fewest on newer devices, scales per row
    tile        tens, and where the others have no kernel
    scaled_mm   more: `torch._scaled_mm`, scales per row of both, or per 128 columns and per 128 × 128

With `batch_invariant` it is `tile` with tiles of one shape: an element is the same sum whatever else is in the batch.

Bound: a byte per weight up to about 240 rows, then 1440 TFLOP/s of an H100.
Shape suffixes: M rows, N out_features, K in_features.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from quantkit_kernels import byte_stream
from quantkit_kernels.batch_invariant import in_fixed_rows
from quantkit_kernels.capability import HOPPER, capability, converts_float8
from quantkit_kernels.dispatch import choose
from quantkit_kernels.family import Family, Route
from quantkit_kernels.operands import (
    FLOAT32,
    FLOATS,
    check_bias,
    check_codes,
    check_part,
    check_rows,
    check_scale_of_rows,
)
from quantkit_kernels.operators import operator
from quantkit_kernels.skinny import MAX_ROWS, MIN_CAPABILITY, skinny
from quantkit_kernels.strip_weight import StripWeight
from quantkit_kernels.weight import LinearWeight

BLOCK = 128
ALIGNED = 16
E4M3 = (torch.float8_e4m3fn,)


class Fp8Weight(NamedTuple):
    """codes_NK: float8_e4m3fn, padded. scale: float32, [N], padded with ones, or [ceil(N / 128), ceil(K / 128)]."""

    codes_NK: Tensor
    scale: Tensor
    shape: tuple[int, int]

    @property
    def in_blocks(self) -> bool:
        """Whether 128 × 128 weights share a scale."""
        return self.scale.ndim == 2


def prepare(weight: LinearWeight) -> Fp8Weight:
    """Pad where the shape asks for it; otherwise the codes are those of the checkpoint."""
    num_rows, num_cols = weight.codes_NK.shape
    codes = aligned(weight.codes_NK, -num_rows % ALIGNED)
    scale = weight.scale_RG.float()
    if weight.tile[1] < num_cols:
        return Fp8Weight(codes, scale.contiguous(), (num_rows, num_cols))
    of_row = torch.arange(num_rows, device=scale.device) // weight.tile[0]
    scale = pad(scale[of_row, 0], (0, -num_rows % ALIGNED), value=1.0)
    return Fp8Weight(codes, scale.contiguous(), (num_rows, num_cols))


def aligned(codes: Tensor, extra_rows: int = 0) -> Tensor:
    """Codes whose rows are contiguous, start at multiples of 16 bytes, and are padded with zeros to such a length."""
    (step, between), num_cols = codes.stride(), codes.shape[1]
    extra = -num_cols % ALIGNED
    is_aligned = step % ALIGNED == 0 and codes.data_ptr() % ALIGNED == 0
    if extra == extra_rows == 0 and between == 1 and step >= num_cols and is_aligned:
        return codes
    return pad(codes.view(torch.int8), (0, extra, 0, extra_rows)).view(codes.dtype).contiguous()


def multiply(
    codes_MK: Tensor,
    x_scale: Tensor,
    weight: Fp8Weight,
    bias_N: Tensor | None,
    out_dtype: torch.dtype,
    *,
    batch_invariant: bool = False,
) -> Tensor:
    """`w8a8_fp8` with a prepared weight."""
    codes_NK, scale, (num_outputs, _) = weight
    return w8a8_fp8(codes_MK, x_scale, codes_NK, scale, bias_N, num_outputs, out_dtype, batch_invariant)


def plain(
    codes_MK: Tensor,
    x_scale: Tensor,
    w_codes_NK: Tensor,
    w_scale: Tensor,
    bias_N: Tensor | None,
    num_outputs: int,
    out_dtype: torch.dtype,
    batch_invariant: bool = False,
) -> Tensor:
    """`w8a8_fp8` in plain torch: codes as float32, scales of blocks before the product, others after it."""
    _check(codes_MK, x_scale, w_codes_NK, w_scale, bias_N, num_outputs, out_dtype)
    if batch_invariant and len(codes_MK) > 0:
        return in_fixed_rows(
            lambda codes, scale: plain(codes, scale, w_codes_NK, w_scale, bias_N, num_outputs, out_dtype),
            codes_MK, x_scale.expand(len(codes_MK), -1),
        )  # fmt: skip
    num_cols = codes_MK.shape[1]
    x_MK, w_NK = codes_MK.float(), w_codes_NK[:num_outputs, :num_cols].float()
    if w_scale.ndim == 2:
        x_MK = x_MK * x_scale.repeat_interleave(BLOCK, dim=1)[:, :num_cols]
        rows = torch.arange(num_outputs, device=w_scale.device) // BLOCK
        w_NK = w_NK * w_scale[rows].repeat_interleave(BLOCK, dim=1)[:, :num_cols]
        y_MN = x_MK @ w_NK.T
    else:
        y_MN = (x_MK @ w_NK.T).mul_(x_scale).mul_(w_scale[:num_outputs])
    return (y_MN if bias_N is None else y_MN.add_(bias_N)).to(out_dtype)


def _fake(
    codes_MK: Tensor,
    x_scale: Tensor,
    w_codes_NK: Tensor,
    w_scale: Tensor,
    bias_N: Tensor | None,
    num_outputs: int,
    out_dtype: torch.dtype,
    batch_invariant: bool = False,
) -> Tensor:
    return codes_MK.new_empty(codes_MK.shape[0], num_outputs, dtype=out_dtype)


@operator("w8a8_fp8", cpu=plain, fake=_fake)
def w8a8_fp8(
    codes_MK: Tensor,
    x_scale: Tensor,
    w_codes_NK: Tensor,
    w_scale: Tensor,
    bias_N: Tensor | None,
    num_outputs: int,
    out_dtype: torch.dtype,
    batch_invariant: bool = False,
) -> Tensor:
    """x · wᵀ (+ bias), [M, N] in out_dtype.

    codes_MK: float8_e4m3fn, columns contiguous. x_scale: float32 [M, 1] or [1]; with w_scale in blocks
    [M, ceil(K / 128)]. w_codes_NK, w_scale: of an `Fp8Weight`. bias_N: bf16, fp16 or fp32. batch_invariant: a row's
    result does not depend on how many others there are.
    """
    _check(codes_MK, x_scale, w_codes_NK, w_scale, bias_N, num_outputs, out_dtype)
    if not converts_float8(codes_MK.device):  # nor multiplies it
        return plain(codes_MK, x_scale, w_codes_NK, w_scale, bias_N, num_outputs, out_dtype, batch_invariant)
    num_rows, num_cols = codes_MK.shape
    if num_rows == 0:
        return codes_MK.new_empty(0, num_outputs, dtype=out_dtype)
    weight = Fp8Weight(w_codes_NK, w_scale, (num_outputs, num_cols))
    if batch_invariant:
        return _tile(codes_MK, weight, x_scale=x_scale, bias_N=bias_N, out_dtype=out_dtype, fixed=True)
    family = FAMILY if w_scale.ndim == 1 else BLOCK_FAMILY
    route = choose(family, num_rows, num_outputs, num_cols, codes_MK.device)
    return route.run(codes_MK, weight, x_scale=x_scale, bias_N=bias_N, out_dtype=out_dtype)


def _stream(
    codes_MK: Tensor,
    weight: Fp8Weight,
    *,
    x_scale: Tensor,
    out_dtype: torch.dtype,
    bias_N: Tensor | None = None,
) -> Tensor:
    return byte_stream.stream(
        aligned(codes_MK),
        weight.codes_NK,
        weight.scale,
        num_outputs=weight.shape[0],
        out_dtype=out_dtype,
        x_scale=x_scale,
        bias_N=bias_N,
    )


def _skinny(
    codes_MK: Tensor,
    weight: Fp8Weight,
    *,
    x_scale: Tensor,
    out_dtype: torch.dtype,
    bias_N: Tensor | None = None,
) -> Tensor:
    if out_dtype == torch.float32:  # skinny writes 16 bits
        return _tile(codes_MK, weight, x_scale=x_scale, bias_N=bias_N, out_dtype=out_dtype)
    codes_NK, scale, (num_outputs, num_cols) = weight
    rows = StripWeight(codes_NK, scale[:num_outputs], None, None, (num_outputs, num_cols), 8, 0)
    return few_rows(codes_MK, rows, x_scale=x_scale, bias_N=bias_N, out_dtype=out_dtype)


def _tile(
    codes_MK: Tensor,
    weight: Fp8Weight,
    *,
    x_scale: Tensor,
    out_dtype: torch.dtype,
    bias_N: Tensor | None = None,
    fixed: bool = False,
) -> Tensor:
    """fixed: by tiles of one shape, whatever the number of rows."""
    from quantkit_kernels import byte_tile_kernel

    y_MN = torch.empty(codes_MK.shape[0], weight.shape[0], dtype=out_dtype, device=codes_MK.device)
    shape = byte_tile_kernel.fixed_shape(codes_MK.device) if fixed else None
    byte_tile_kernel.multiply(
        aligned(codes_MK), x_scale, weight.codes_NK, weight.scale, y_MN, shape, bias_N=bias_N
    )
    return y_MN


def _scaled(
    codes_MK: Tensor,
    weight: Fp8Weight,
    *,
    x_scale: Tensor,
    out_dtype: torch.dtype,
    bias_N: Tensor | None = None,
) -> Tensor:
    if weight.in_blocks and not _has_cublas_blocks(weight.codes_NK, codes_MK.device):
        return _tile(codes_MK, weight, x_scale=x_scale, out_dtype=out_dtype, bias_N=bias_N)
    codes_MK = aligned(codes_MK)
    return _scaled_mm(codes_MK, x_scale, weight.codes_NK, weight.scale, bias_N, weight.shape[0], out_dtype)


STREAM = Route(
    name="stream",
    run=_stream,
    max_rows=byte_stream.MAX_ROWS,
    min_capability=byte_stream.CAPABILITY,
    max_capability=byte_stream.CAPABILITY,
)
TILE = Route(name="tile", run=_tile, min_capability=(8, 9))
SCALED_MM = Route(name="scaled_mm", run=_scaled, min_capability=(8, 9))
FAMILY = Family(
    name="w8a8_fp8",
    routes=(
        STREAM,
        Route(name="skinny", run=_skinny, max_rows=MAX_ROWS, min_capability=MIN_CAPABILITY),
        TILE,
        SCALED_MM,
    ),
    prepare=prepare,
    weight_bytes=1,
    input_dtype=torch.float8_e4m3fn,
)
BLOCK_FAMILY = Family(
    name="w8a8_fp8_block",
    routes=(STREAM, TILE, SCALED_MM),
    prepare=prepare,
    weight_bytes=1,
    input_dtype=torch.float8_e4m3fn,
)


def few_rows(
    codes_MK: Tensor,
    weight: StripWeight,
    *,
    x_scale: Tensor,
    out_dtype: torch.dtype,
    zero_point: Tensor | None = None,
    bias_N: Tensor | None = None,
) -> Tensor:
    """The product of codes by `skinny`, which reads the codes of 8-bit weights as they are."""
    return skinny(
        codes_MK,
        weight,
        out_dtype=out_dtype,
        x_scale=x_scale.contiguous(),
        x_zero_point=None if zero_point is None else zero_point.float(),
        bias_N=None if bias_N is None else bias_N.to(out_dtype),
        dependent=True,
    )


def _scaled_mm(
    codes_MK: Tensor,
    x_scale: Tensor,
    w_codes_NK: Tensor,
    w_scale: Tensor,
    bias_N: Tensor | None,
    num_outputs: int,
    out_dtype: torch.dtype,
) -> Tensor:
    num_rows, num_padded = len(codes_MK), len(w_codes_NK)
    if w_scale.ndim == 2:  # scales of x side by side for rows, not for columns, and rows in fours
        extra = -num_rows % 4
        if extra:
            codes_MK = pad(codes_MK.view(torch.int8), (0, 0, 0, extra)).view(codes_MK.dtype)
            x_scale = pad(x_scale, (0, 0, 0, extra))
        scales = x_scale.T.contiguous().T, w_scale.T
    else:
        scales = x_scale.expand(num_rows, 1).contiguous(), w_scale[None]
    if bias_N is not None and out_dtype != torch.float32:
        bias_N = pad(bias_N, (0, num_padded - num_outputs)).to(out_dtype)
    in_product = None if out_dtype == torch.float32 else bias_N
    y_MN = torch._scaled_mm(
        codes_MK, w_codes_NK.T, scale_a=scales[0], scale_b=scales[1], bias=in_product, out_dtype=out_dtype
    )[:num_rows, :num_outputs]
    return (y_MN if bias_N is None or in_product is not None else y_MN + bias_N).contiguous()


def _has_cublas_blocks(w_codes_NK: Tensor, device: torch.device) -> bool:
    """Whether cuBLAS multiplies in blocks of 128: on Hopper, whole blocks, a multiple of four of them along K."""
    num_padded, num_cols = w_codes_NK.shape
    return num_padded % BLOCK == 0 and num_cols % (4 * BLOCK) == 0 and _is_hopper_with_blocks(device)


@functools.cache
def _is_hopper_with_blocks(device: torch.device) -> bool:
    version = tuple(int(part) for part in (torch.version.cuda or "0").split(".")[:2])
    return version >= (12, 9) and capability(device) == HOPPER


def _check(
    codes_MK: Tensor,
    x_scale: Tensor,
    w_codes_NK: Tensor,
    w_scale: Tensor,
    bias_N: Tensor | None,
    num_outputs: int,
    out_dtype: torch.dtype,
) -> None:
    check_codes(codes_MK, E4M3, out_dtype)
    (num_rows, num_cols), device = codes_MK.shape, codes_MK.device
    num_padded = check_rows(w_codes_NK, E4M3, num_cols, device)
    assert num_outputs <= num_padded < num_outputs + ALIGNED, f"{num_padded} rows of weight for {num_outputs}"
    check_bias(bias_N, FLOATS, num_outputs, device)
    if w_scale.ndim == 1:
        check_scale_of_rows(x_scale, None, num_rows, device)
        check_part("scales", w_scale, FLOAT32, (num_padded,), device)
        return
    blocks = -(-num_cols // BLOCK)
    check_part("scales of blocks", w_scale, FLOAT32, (-(-num_outputs // BLOCK), blocks), device)
    is_right = x_scale.shape == (num_rows, blocks) and x_scale.dtype == torch.float32
    assert is_right and x_scale.device == device, (
        f"scales of x: {x_scale.dtype} {tuple(x_scale.shape)} on {x_scale.device}, not of {num_rows} x {blocks} blocks"
    )
