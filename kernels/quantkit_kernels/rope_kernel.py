"""`rope_append` on a GPU: a program takes one token and HEADS heads of one kind: queries, keys or values.

Each element is read twice, by itself and as its pair's partner, the second time from the cache.

Bound: bytes. 2 (Q + 2H) D read, 2 Q D and the codes of 2 H D written, per token.
Shape suffixes: T tokens, Q query heads, H KV heads, D head_dim, R rotated dimensions, P blocks, S slots of a block.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantkit_kernels.capability import converts_float8, starts_early
from quantkit_kernels.rope_append import LARGEST_CODE, Append
from quantkit_kernels.row_codes_kernel import amax_of, as_bytes, code_of, rounded, scale_of, scaled_by
from quantkit_kernels.triton_launch import Launcher, num_parts, power_above

ELEMENTS, NUM_WARPS = 1024, 4  # of a program


@triton.jit
def rotated_heads(
    x, weight, cos, sin, position, head, column, is_there, eps,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, PLUS_ONE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Heads of one token, normed (weight None: not) and rotated, as float32 values of DTYPE. x: pointer to head 0."""
    is_first = column < HALF
    is_turned = column < 2 * HALF
    partner = tl.where(is_first, column + HALF, tl.where(is_turned, column - HALF, column))
    x_HD = tl.load(x + head[:, None] * HEAD_DIM + column[None, :], mask=is_there, other=0.0).to(tl.float32)
    y_HD = tl.load(x + head[:, None] * HEAD_DIM + partner[None, :], mask=is_there, other=0.0).to(tl.float32)
    is_column = column < HEAD_DIM
    if weight is not None:
        rms_H1 = tl.math.rsqrt(tl.sum(x_HD * x_HD, axis=1, keep_dims=True) / HEAD_DIM + eps)
        w_D = tl.load(weight + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
        w_pair_D = tl.load(weight + partner, mask=is_column, other=0.0).to(tl.float32)[None, :]
        if PLUS_ONE:
            x_HD = rounded(x_HD * rms_H1 * (1.0 + w_D), DTYPE)
            y_HD = rounded(y_HD * rms_H1 * (1.0 + w_pair_D), DTYPE)
        else:
            x_HD = rounded(w_D * rounded(x_HD * rms_H1, DTYPE), DTYPE)
            y_HD = rounded(w_pair_D * rounded(y_HD * rms_H1, DTYPE), DTYPE)
    at = position * HALF + tl.where(is_first, column, column - HALF)
    cos_D = tl.load(cos + at, mask=is_turned, other=1.0)
    sin_D = tl.load(sin + at, mask=is_turned, other=0.0)
    return rounded(x_HD * cos_D[None, :] + y_HD * tl.where(is_first, -sin_D, sin_D)[None, :], DTYPE)


@triton.jit
def store_heads(
    x_HD, page, scale, block, slot, head, column, is_there, stride_block, stride_head, stride_slot,
    NUM_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, LARGEST: tl.constexpr, IS_PER_TOKEN: tl.constexpr,
    HAS_FLOAT8: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Heads of one token into its slot. page: 16-bit, or bytes of codes with LARGEST the largest of them."""
    at = page + block * stride_block + head[:, None] * stride_head + slot * stride_slot + column[None, :]
    if scale is None:
        tl.store(at, x_HD.to(DTYPE), mask=is_there)
    else:
        if IS_PER_TOKEN:
            scale_H = scale_of(amax_of(x_HD, 1), LARGEST, DTYPE)
            tl.store(scale + (block * NUM_HEADS + head) * BLOCK_SIZE + slot, scale_H, mask=head < NUM_HEADS)
        else:
            scale_H = rounded(tl.load(scale + head, mask=head < NUM_HEADS, other=1.0), DTYPE)
        scaled_HD = scaled_by(x_HD, scale_H[:, None], DTYPE)
        tl.store(at, code_of(scaled_HD, None, LARGEST == 448.0, HAS_FLOAT8, DTYPE), mask=is_there)


@triton.jit
def rope_append_kernel(
    qkv, positions, cos, sin, slots, q_weight, k_weight, q, keys, values, k_scale, v_scale,
    stride_qkv, stride_block, stride_head, stride_slot, eps,
    NUM_QUERIES: tl.constexpr, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, PLUS_ONE: tl.constexpr, LARGEST: tl.constexpr, IS_PER_TOKEN: tl.constexpr,
    HAS_FLOAT8: tl.constexpr, EARLY: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Programs along axis 1: query heads, then key heads, then value heads, HEADS each."""
    DTYPE: tl.constexpr = qkv.dtype.element_ty
    Q_PARTS: tl.constexpr = (NUM_QUERIES + HEADS - 1) // HEADS
    KV_PARTS: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    column = tl.arange(0, COLUMNS)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    qkv += token * stride_qkv
    position = tl.load(positions + token).to(tl.int64)
    if part < Q_PARTS:
        head = part * HEADS + tl.arange(0, HEADS)
        is_there = (head < NUM_QUERIES)[:, None] & (column < HEAD_DIM)[None, :]
        q_QD = rotated_heads(
            qkv, q_weight, cos, sin, position, head, column, is_there, eps, HEAD_DIM, HALF, PLUS_ONE, DTYPE
        )
        at = q + token * NUM_QUERIES * HEAD_DIM + head[:, None] * HEAD_DIM + column[None, :]
        tl.store(at, q_QD.to(DTYPE), mask=is_there)
    else:
        where = tl.load(slots + token).to(tl.int64)
        if where >= 0:
            block, slot = where // BLOCK_SIZE, where % BLOCK_SIZE
            head = (part - Q_PARTS) % KV_PARTS * HEADS + tl.arange(0, HEADS)
            is_there = (head < NUM_HEADS)[:, None] & (column < HEAD_DIM)[None, :]
            if part < Q_PARTS + KV_PARTS:
                k_HD = rotated_heads(
                    qkv + NUM_QUERIES * HEAD_DIM, k_weight, cos, sin, position, head, column, is_there, eps,
                    HEAD_DIM, HALF, PLUS_ONE, DTYPE,
                )  # fmt: skip
                store_heads(
                    k_HD, keys, k_scale, block, slot, head, column, is_there, stride_block, stride_head, stride_slot,
                    NUM_HEADS, BLOCK_SIZE, LARGEST, IS_PER_TOKEN, HAS_FLOAT8, DTYPE,
                )  # fmt: skip
            else:
                at = qkv + (NUM_QUERIES + NUM_HEADS) * HEAD_DIM + head[:, None] * HEAD_DIM + column[None, :]
                v_HD = tl.load(at, mask=is_there, other=0.0).to(tl.float32)
                store_heads(
                    v_HD, values, v_scale, block, slot, head, column, is_there, stride_block, stride_head, stride_slot,
                    NUM_HEADS, BLOCK_SIZE, LARGEST, IS_PER_TOKEN, HAS_FLOAT8, DTYPE,
                )  # fmt: skip


_rope_append = Launcher(rope_append_kernel)


def launch(step: Append, *, elements: int = ELEMENTS, num_warps: int = NUM_WARPS) -> Tensor:
    """`rope_append` without the operator around it."""
    step.check()
    num_tokens, num_queries = len(step.qkv_TX), step.num_queries
    _, num_heads, block_size, head_dim = step.k_PHSD.shape
    q_TQD = step.qkv_TX.new_empty(num_tokens, num_queries, head_dim)
    if num_tokens == 0:
        return q_TQD
    columns = power_above(head_dim)
    heads = max(1, min(elements // columns, power_above(num_heads)))
    is_coded = step.k_scale is not None
    pages = [as_bytes(page) if is_coded else page for page in (step.k_PHSD, step.v_PHSD)]
    early = starts_early(step.qkv_TX.device)
    tables = (step.positions_T, step.cos, step.sin, step.slots_T, step.q_weight_D, step.k_weight_D)
    strides = (step.qkv_TX.stride(0), *step.k_PHSD.stride()[:3])
    shape = (num_queries, num_heads, head_dim, step.cos.shape[1], block_size)
    how = (
        LARGEST_CODE.get(step.k_PHSD.dtype, 0.0),
        step.has_scale_per_token,
        converts_float8(step.qkv_TX.device),
    )
    _rope_append(
        (num_tokens, num_parts(num_queries, heads) + 2 * num_parts(num_heads, heads)),
        (step.qkv_TX, *tables, q_TQD, *pages, step.k_scale, step.v_scale, *strides, step.eps),
        (*shape, step.plus_one, *how, early, heads, columns),
        num_warps=num_warps,
        early=early,
    )
    return q_TQD
