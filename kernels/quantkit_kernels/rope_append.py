"""Norm and rotation of queries and keys, and keys and values into the pages, in one pass over the packed projection.

    qkv [T, (Q + 2H) D]   | q: Q heads of D | k: H heads | v: H heads |
                                 │                 │            │
                           norm, rotate      norm, rotate       │
                                 ▼                 ▼ encode     ▼ encode
                          q [T, Q, D]       k_PHSD[slot // S, h, slot % S]   v_PHSD[…]       pages as in `paged_kv`

A program takes one token and HEADS heads of one kind. Each element is read twice, by itself and as its pair's partner
(i, i ± R / 2 for the first R of D dimensions; the others are not rotated), the second time from the cache.

Rotation is in float32, cosines and sines included, and rounded once, after the norm's roundings (those of
`norm_quant`). Codes are chosen from rounded keys and values, each step in their dtype: code = x / scale, clamped and
rounded, with a scale per head [H], given, or per token and head [P, H, S], amax / 127 (INT8) or / 448 (e4m3), written
beside the codes. A token whose slot is −1 is not stored; its query is rotated all the same.

Bound: bytes. 2 (Q + 2H) D read, 2 Q D and the codes of 2 H D written, per token.
Shape suffixes: T tokens, Q query heads, H KV heads, D head_dim, R rotated dimensions, P blocks, S slots of a block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantkit_kernels.capability import converts_float8, starts_early
from quantkit_kernels.norm_quant import norm_rows
from quantkit_kernels.row_codes import code_of, rounded, scale_of, scaled_by

LARGEST_CODE = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
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
            scale_H = scale_of(tl.max(tl.abs(x_HD), axis=1), LARGEST, DTYPE)
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


@torch.library.custom_op(
    "quantkit::rope_append", mutates_args=("k_PHSD", "v_PHSD", "k_scale", "v_scale"), device_types="cuda"
)
def rope_append(
    qkv_TX: Tensor,
    positions_T: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots_T: Tensor,
    q_weight_D: Tensor | None,
    k_weight_D: Tensor | None,
    eps: float,
    plus_one: bool,
    k_PHSD: Tensor,
    v_PHSD: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> Tensor:
    """Rotated queries [T, Q, D] in the dtype of qkv; keys and values are in their slots afterwards.

    qkv_TX: [T, (Q + 2H) D], features contiguous; Q is what its width leaves. positions_T, slots_T: int32 or int64;
    slot = block · S + offset, or −1. cos, sin: float32 [positions, R / 2], one row per position. q_weight_D,
    k_weight_D, eps, plus_one: norms of each head, or None. k_PHSD, v_PHSD: the dtype of qkv, int8 or float8_e4m3fn;
    with codes, k_scale and v_scale: float32 [H], read, or [P, H, S], written.
    """
    return launch(
        qkv_TX, positions_T, cos, sin, slots_T, q_weight_D, k_weight_D, eps, plus_one, k_PHSD, v_PHSD, k_scale, v_scale
    )  # fmt: skip


@rope_append.register_fake
def _(
    qkv_TX: Tensor,
    positions_T: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots_T: Tensor,
    q_weight_D: Tensor | None,
    k_weight_D: Tensor | None,
    eps: float,
    plus_one: bool,
    k_PHSD: Tensor,
    v_PHSD: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> Tensor:
    return qkv_TX.new_empty(qkv_TX.shape[0], num_queries(qkv_TX, k_PHSD), k_PHSD.shape[3])


@rope_append.register_kernel("cpu")
def rotate_and_append(
    qkv_TX: Tensor,
    positions_T: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots_T: Tensor,
    q_weight_D: Tensor | None,
    k_weight_D: Tensor | None,
    eps: float,
    plus_one: bool,
    k_PHSD: Tensor,
    v_PHSD: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> Tensor:
    """`rope_append` in plain torch."""
    _check(qkv_TX, positions_T, cos, sin, slots_T, (q_weight_D, k_weight_D), k_PHSD, v_PHSD, k_scale, v_scale)
    num_heads, head_dim = k_PHSD.shape[1], k_PHSD.shape[3]
    q_TQD, k_THD, v_THD = qkv_TX.unflatten(1, (-1, head_dim)).split(
        (num_queries(qkv_TX, k_PHSD), num_heads, num_heads), dim=1
    )
    angles = cos[positions_T.long()], sin[positions_T.long()]
    k_THD = rotate(_norm_heads(k_THD, k_weight_D, eps, plus_one), *angles)
    append(k_THD, slots_T, k_PHSD, k_scale)
    append(v_THD, slots_T, v_PHSD, v_scale)
    return rotate(_norm_heads(q_TQD, q_weight_D, eps, plus_one), *angles)


def rotate(x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Rotate the pairs (i, i + R / 2) of the first R dimensions in float32; cos_TR, sin_TR: [T, R / 2]."""
    half = cos_TR.shape[1]
    cos_TR, sin_TR = cos_TR.unsqueeze(1), sin_TR.unsqueeze(1)
    first, second, rest = x_THD.float().split((half, half, x_THD.shape[2] - 2 * half), dim=2)
    turned = (first * cos_TR - second * sin_TR, second * cos_TR + first * sin_TR, rest)
    return torch.cat(turned, dim=2).to(x_THD.dtype)


def append(x_THD: Tensor, slots_T: Tensor, page_PHSD: Tensor, scale: Tensor | None) -> None:
    """Store the tokens that have a slot; scale: None, [H], or [P, H, S], which is written."""
    is_kept_T = slots_T >= 0
    x_THD, slots_T = x_THD[is_kept_T], slots_T[is_kept_T].long()
    block_T, slot_T = slots_T // page_PHSD.shape[2], slots_T % page_PHSD.shape[2]
    if scale is not None:
        if scale.ndim == 3:
            scale_TH = x_THD.abs().amax(dim=2) / LARGEST_CODE[page_PHSD.dtype]
            scale_TH = scale_TH.masked_fill(scale_TH == 0, torch.finfo(x_THD.dtype).eps)
            scale[block_T, :, slot_T] = scale_TH.float()
        else:
            scale_TH = scale.to(x_THD.dtype).expand(len(x_THD), -1)
        scaled = x_THD / scale_TH.unsqueeze(2)
        is_int8 = page_PHSD.dtype == torch.int8
        x_THD = (scaled.clamp(-128, 127).round() if is_int8 else scaled.clamp(-448, 448)).to(page_PHSD.dtype)
    # as bytes: indexed stores know no float8
    bits = page_PHSD.view(torch.int8) if page_PHSD.itemsize == 1 else page_PHSD
    bits[block_T, :, slot_T] = x_THD.view(bits.dtype)


def launch(
    qkv_TX: Tensor,
    positions_T: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots_T: Tensor,
    q_weight_D: Tensor | None,
    k_weight_D: Tensor | None,
    eps: float,
    plus_one: bool,
    k_PHSD: Tensor,
    v_PHSD: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    *,
    elements: int = ELEMENTS,
    num_warps: int = NUM_WARPS,
) -> Tensor:
    """`rope_append` without the operator around it."""
    _check(qkv_TX, positions_T, cos, sin, slots_T, (q_weight_D, k_weight_D), k_PHSD, v_PHSD, k_scale, v_scale)
    num_tokens, queries = qkv_TX.shape[0], num_queries(qkv_TX, k_PHSD)
    _, num_heads, block_size, head_dim = k_PHSD.shape
    q_TQD = qkv_TX.new_empty(num_tokens, queries, head_dim)
    if num_tokens == 0:
        return q_TQD
    columns = triton.next_power_of_2(head_dim)
    heads = max(1, min(elements // columns, triton.next_power_of_2(num_heads)))
    largest = LARGEST_CODE.get(k_PHSD.dtype, 0.0)
    if k_scale is not None:
        k_PHSD, v_PHSD = k_PHSD.view(torch.int8), v_PHSD.view(torch.int8)
    early = starts_early(qkv_TX.device)
    rope_append_kernel[(num_tokens, triton.cdiv(queries, heads) + 2 * triton.cdiv(num_heads, heads))](
        qkv_TX, positions_T, cos, sin, slots_T, q_weight_D, k_weight_D, q_TQD, k_PHSD, v_PHSD, k_scale, v_scale,
        qkv_TX.stride(0), *k_PHSD.stride()[:3], eps, queries, num_heads, head_dim, cos.shape[1], block_size, plus_one,
        largest, k_scale is not None and k_scale.ndim == 3,
        converts_float8(qkv_TX.device), early, heads, columns, num_warps=num_warps, launch_pdl=early,
    )  # fmt: skip
    return q_TQD


def num_queries(qkv_TX: Tensor, k_PHSD: Tensor) -> int:
    """Query heads that the width of qkv leaves."""
    return qkv_TX.shape[1] // k_PHSD.shape[3] - 2 * k_PHSD.shape[1]


def _norm_heads(x_THD: Tensor, weight_D: Tensor | None, eps: float, plus_one: bool) -> Tensor:
    if weight_D is None:
        return x_THD
    return norm_rows(x_THD.reshape(-1, x_THD.shape[2]), None, weight_D, eps, plus_one).view(x_THD.shape)


def _check(
    qkv_TX: Tensor,
    positions_T: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots_T: Tensor,
    weights: tuple[Tensor | None, Tensor | None],
    k_PHSD: Tensor,
    v_PHSD: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    _, num_heads, _, head_dim = k_PHSD.shape
    assert qkv_TX.ndim == 2 and qkv_TX.stride(1) == 1, f"qkv {qkv_TX.shape} by {qkv_TX.stride()}"
    assert qkv_TX.shape[1] % head_dim == 0 and num_queries(qkv_TX, k_PHSD) > 0, f"qkv {qkv_TX.shape}"
    for per_token in (positions_T, slots_T):
        assert per_token.shape == qkv_TX.shape[:1] and per_token.stride(0) == 1, f"{per_token.shape} of tokens"
        assert per_token.dtype in (torch.int32, torch.int64), f"positions and slots of {per_token.dtype}"
    for table in (cos, sin):
        assert table.dtype == torch.float32 and table.is_contiguous(), f"angles of {table.dtype}"
        assert table.shape == cos.shape and 2 * table.shape[1] <= head_dim, f"angles {table.shape}"
    for weight_D in weights:
        assert weight_D is None or (weight_D.shape == (head_dim,) and weight_D.dtype == qkv_TX.dtype), (
            f"norm {weight_D.shape} of {weight_D.dtype}"
        )
    assert v_PHSD.shape == k_PHSD.shape and v_PHSD.stride() == k_PHSD.stride(), "k and v are laid out alike"
    assert v_PHSD.dtype == k_PHSD.dtype and k_PHSD.stride(3) == 1, f"pages of {k_PHSD.dtype} and {v_PHSD.dtype}"
    for scale in (k_scale, v_scale):
        if scale is None:
            assert k_PHSD.dtype == qkv_TX.dtype, f"pages of {k_PHSD.dtype} without a scale"
            continue
        assert k_PHSD.dtype in LARGEST_CODE and scale.dtype == torch.float32, f"scales beside {k_PHSD.dtype}"
        assert scale.is_contiguous() and scale.shape in ((num_heads,), k_PHSD.shape[:3]), f"scale {scale.shape}"
    assert (k_scale is None) == (v_scale is None) and (
        k_scale is None or v_scale is None or k_scale.shape == v_scale.shape
    ), "k and v have scales of one kind"
