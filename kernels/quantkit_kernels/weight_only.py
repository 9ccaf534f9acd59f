"""y = x · wᵀ (+ bias) with x in 16 bits and w in INT4, INT8, FP8 or 16 bits: W4A16, W8A16, and no quantization at all.

    M ≤ 32              skinny    weights streamed once, bound by their bytes                 compute capability ≥ 9.0
    M ≤ 64              stream    8-bit weights with scales per row, the same                 9.0
    tens to hundreds    tile      4- and 8-bit weights on wgmma, from registers               9.0
    more                wide      the same, x as it is, tiles that fill every multiprocessor  9.0
    elsewhere           sliced    a slice of w in 16 bits, small enough for the L2, cuBLAS    any

All read one `StripWeight`. On a CPU the weight is made dense: that is the definition of the operator, not how a CPU
serves (the catalog has kernels for that).

Shape suffixes: M rows, N out_features, K in_features.
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from quantkit_kernels import byte_stream
from quantkit_kernels.batch_invariant import FIXED_ROWS, in_fixed_rows
from quantkit_kernels.capability import capability, num_multiprocessors
from quantkit_kernels.dispatch import choose
from quantkit_kernels.family import Family, Route
from quantkit_kernels.operands import FLOATS, check_bias, check_fragments, check_rows, check_scales
from quantkit_kernels.operators import operator
from quantkit_kernels.skinny import MAX_ROWS, MIN_CAPABILITY, skinny
from quantkit_kernels.sliced import sliced
from quantkit_kernels.strip_weight import StripWeight, aligned_rows, dense, prepare, prepare_dense
from quantkit_kernels.tile import CAPABILITY, fixed_tiling, tile
from quantkit_kernels.wide import wide


def cublas(x_MK: Tensor, weight: StripWeight, *, bias_N: Tensor | None = None) -> Tensor:
    """The product with a 16-bit weight as torch has it."""
    return linear(x_MK, weight.stored[:, : weight.shape[1]], bias_N)


def stream(x_MK: Tensor, weight: StripWeight, *, bias_N: Tensor | None = None) -> Tensor:
    """`byte_stream` where scales are per row; those of groups go to what takes so many rows without it."""
    if weight.scale is None or weight.group_size:
        route = SKINNY if len(x_MK) <= MAX_ROWS // 2 else TILE
        return route.run(x_MK, weight, bias_N=bias_N)
    return byte_stream.stream(
        aligned_rows(x_MK),
        weight.stored,
        weight.scale,
        num_outputs=weight.shape[0],
        out_dtype=x_MK.dtype,
        bias_N=bias_N,
    )


SKINNY = Route(
    name="skinny", run=partial(skinny, dependent=True), max_rows=MAX_ROWS, min_capability=MIN_CAPABILITY
)
STREAM = Route(
    name="stream",
    run=stream,
    max_rows=byte_stream.MAX_ROWS,
    min_capability=byte_stream.CAPABILITY,
    max_capability=byte_stream.CAPABILITY,
)
TILE = Route(
    name="tile", run=partial(tile, dependent=True), min_capability=CAPABILITY, max_capability=CAPABILITY
)
WIDE = Route(
    name="wide", run=partial(wide, dependent=True), min_capability=CAPABILITY, max_capability=CAPABILITY
)
SLICED = Route(name="sliced", run=sliced)
W4A16 = Family(name="w4a16", routes=(SKINNY, TILE, WIDE, SLICED), prepare=prepare, weight_bytes=0.5)
W8A16 = Family(name="w8a16", routes=(SKINNY, STREAM, TILE, WIDE, SLICED), prepare=prepare, weight_bytes=1)
DENSE16 = Family(
    name="dense16", routes=(SKINNY, Route(name="cublas", run=cublas)), prepare=prepare_dense, weight_bytes=2
)
OF_BITS = {4: W4A16, 8: W8A16, 16: DENSE16}
BYTES = (torch.int8, torch.float8_e4m3fn)


def multiply(
    x_MK: Tensor, weight: StripWeight, bias_N: Tensor | None = None, *, batch_invariant: bool = False
) -> Tensor:
    """`weight_only` with a prepared weight."""
    stored, scale, zero_point, _, (num_outputs, _), bits, group_size = weight
    return weight_only(
        x_MK, stored, scale, zero_point, bias_N, num_outputs, bits, group_size, batch_invariant
    )


def _cpu(
    x_MK: Tensor,
    stored: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    bias_N: Tensor | None,
    num_outputs: int,
    bits: int,
    group_size: int,
    batch_invariant: bool,
) -> Tensor:
    weight = StripWeight(stored, scale, zero_point, None, (num_outputs, x_MK.shape[-1]), bits, group_size)
    _check(x_MK, weight, bias_N)
    w_NK = dense(weight, x_MK.dtype)
    if batch_invariant and len(x_MK) > 0:
        return in_fixed_rows(lambda rows_MK: linear(rows_MK, w_NK, bias_N), x_MK)
    return linear(x_MK, w_NK, bias_N)


def _fake(
    x_MK: Tensor,
    stored: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    bias_N: Tensor | None,
    num_outputs: int,
    *_: object,
) -> Tensor:
    return x_MK.new_empty(x_MK.shape[0], num_outputs)


@operator("weight_only", cpu=_cpu, fake=_fake)
def weight_only(
    x_MK: Tensor,
    stored: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    bias_N: Tensor | None,
    num_outputs: int,
    bits: int,
    group_size: int,
    batch_invariant: bool,
) -> Tensor:
    """x · wᵀ (+ bias), [M, N] in the dtype of x: bf16 or fp16 (on a CPU also fp32).

    stored … group_size: of a `StripWeight`. bias_N: in the dtype of x. batch_invariant: a row's result does not depend
    on how many others there are.
    """
    shape = x_MK.shape
    weight = StripWeight(stored, scale, zero_point, None, (num_outputs, shape[-1]), bits, group_size)
    _check(x_MK, weight, bias_N)
    num_rows, num_cols = shape
    if num_rows == 0:
        return x_MK.new_empty(0, num_outputs)
    if x_MK.stride()[1] != 1:
        x_MK = x_MK.contiguous()
    family, device = OF_BITS[bits], x_MK.device
    if not batch_invariant:
        return choose(family, num_rows, num_outputs, num_cols, device).run(x_MK, weight, bias_N=bias_N)
    if TILE in family.usable(num_rows, capability(device)):
        tiling = fixed_tiling(weight, num_multiprocessors(device))
        return tile(x_MK, weight, bias_N=bias_N, dependent=True, tiling=tiling)
    route = choose(family, FIXED_ROWS, num_outputs, num_cols, device)
    return in_fixed_rows(lambda rows_MK: route.run(rows_MK, weight, bias_N=bias_N), x_MK)


def _check(x_MK: Tensor, weight: StripWeight, bias_N: Tensor | None) -> None:
    """What `weight_only` says about its operands; weight.shape is [N, columns of x]."""
    stored, scale, zero_point, _, (n, k), bits, group_size = weight
    dtype, device = x_MK.dtype, x_MK.device
    assert x_MK.ndim == 2 and dtype in FLOATS, f"x of shape {tuple(x_MK.shape)} in {dtype}"
    check_bias(bias_N, (dtype,), n, device)
    if bits == 4:
        check_fragments(stored, n, k, device)
    else:
        assert bits in OF_BITS, f"weights of {bits} bits"
        num_rows = check_rows(stored, BYTES if bits == 8 else (dtype,), k, device)
        assert num_rows == n, f"{num_rows} rows of weights for {n} outputs"
    if bits == 16:
        assert scale is zero_point is None and group_size == 0, "weights in 16 bits have no scales"
    else:
        check_scales(scale, zero_point, n, k, group_size, device)
        assert zero_point is None or stored.dtype in (torch.int32, torch.int8), (
            f"codes in {stored.dtype} have no zero points"
        )
