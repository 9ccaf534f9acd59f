"""Norm and rotation of queries and keys, and keys and values into the pages, as one operator.

    qkv [T, (Q + 2H) D]   | q: Q heads of D | k: H heads | v: H heads |
                                 │                 │            │
                           norm, rotate      norm, rotate       │
                                 ▼                 ▼ encode     ▼ encode
                          q [T, Q, D]       k_PHSD[slot // S, h, slot % S]   v_PHSD[…]

Pairs are (i, i + R / 2) of the first R of D dimensions; the others are not rotated. Rotation is in float32, cosines
and sines included, and rounded once, after the norm's roundings (those of `norm_quant`). Codes are chosen from rounded
keys and values, each step in their dtype: code = x / scale, clamped and rounded, with a scale per head [H], given, or
per token and head [P, H, S], amax / 127 (INT8) or / 448 (e4m3), written beside the codes. A token whose slot is −1 is
not stored; its query is rotated all the same.

Shape suffixes: T tokens, X features of a token, Q query heads, H KV heads, D head_dim, R rotated dimensions, P blocks,
S slots of a block.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantkit_kernels.norm_quant import Norm, norm_rows
from quantkit_kernels.operators import operator
from quantkit_kernels.row_codes import nearest, nonzero

LARGEST_CODE = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # amax over the dynamic scale


class Append(NamedTuple):
    """The operator's arguments.

    qkv_TX: [T, (Q + 2H) D], features contiguous; Q is what its width leaves. positions_T, slots_T: int32 or int64;
    slot = block · S + offset, or −1. cos, sin: float32 [positions, R / 2], one row per position. q_weight_D,
    k_weight_D, eps, plus_one: norms of each head, or None. k_PHSD, v_PHSD: the dtype of qkv, int8 or float8_e4m3fn;
    with codes, k_scale and v_scale: float32 [H], read, or [P, H, S], written.
    """

    qkv_TX: Tensor
    positions_T: Tensor
    cos: Tensor
    sin: Tensor
    slots_T: Tensor
    q_weight_D: Tensor | None
    k_weight_D: Tensor | None
    eps: float
    plus_one: bool
    k_PHSD: Tensor
    v_PHSD: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None

    @property
    def num_queries(self) -> int:
        """Query heads."""
        return self.qkv_TX.shape[1] // self.k_PHSD.shape[3] - 2 * self.k_PHSD.shape[1]

    @property
    def has_scale_per_token(self) -> bool:
        """Whether scales are written rather than read."""
        return self.k_scale is not None and self.k_scale.ndim == 3

    def check(self) -> None:
        """What the class says about its fields."""
        qkv_TX, k_PHSD, v_PHSD = self.qkv_TX, self.k_PHSD, self.v_PHSD
        head_dim = k_PHSD.shape[3]
        assert qkv_TX.ndim == 2 and qkv_TX.stride(1) == 1, f"qkv {qkv_TX.shape} by {qkv_TX.stride()}"
        assert qkv_TX.shape[1] % head_dim == 0 and self.num_queries > 0, (
            f"qkv {qkv_TX.shape} for {k_PHSD.shape}"
        )
        for per_token in (self.positions_T, self.slots_T):
            assert per_token.shape == qkv_TX.shape[:1] and per_token.is_contiguous(), (
                f"{per_token.shape} of tokens"
            )
            assert per_token.dtype in (torch.int32, torch.int64), f"positions and slots of {per_token.dtype}"
        for table in (self.cos, self.sin):
            assert table.dtype == torch.float32 and table.is_contiguous(), f"angles of {table.dtype}"
            assert table.shape == self.cos.shape and 2 * table.shape[1] <= head_dim, f"angles {table.shape}"
        for weight_D in (self.q_weight_D, self.k_weight_D):
            if weight_D is not None:
                assert weight_D.shape == (head_dim,) and weight_D.is_contiguous(), f"norm {weight_D.shape}"
                assert weight_D.dtype == qkv_TX.dtype, f"norm of {weight_D.dtype} for {qkv_TX.dtype}"
        assert v_PHSD.shape == k_PHSD.shape and v_PHSD.stride() == k_PHSD.stride(), (
            "k and v are laid out alike"
        )
        assert v_PHSD.dtype == k_PHSD.dtype and k_PHSD.stride(3) == 1, (
            f"pages of {k_PHSD.dtype}, {v_PHSD.dtype}"
        )
        self._check_scales()

    def _check_scales(self) -> None:
        k_PHSD, k_scale, v_scale = self.k_PHSD, self.k_scale, self.v_scale
        if k_scale is None or v_scale is None:
            assert k_scale is v_scale, "k and v have scales of one kind"
            assert k_PHSD.dtype == self.qkv_TX.dtype, f"pages of {k_PHSD.dtype} without a scale"
            return
        assert k_PHSD.dtype in LARGEST_CODE, f"scales beside {k_PHSD.dtype}"
        assert k_scale.shape == v_scale.shape, "k and v have scales of one kind"
        for scale in (k_scale, v_scale):
            assert scale.shape in (k_PHSD.shape[1:2], k_PHSD.shape[:3]), (
                f"scale {scale.shape} for {k_PHSD.shape}"
            )
            assert scale.is_contiguous() and scale.dtype == torch.float32, f"scale of {scale.dtype}"


def rotate_and_append(*arguments: Any) -> Tensor:
    """`rope_append` in plain torch."""
    step = Append(*arguments)
    step.check()
    num_heads, head_dim = step.k_PHSD.shape[1], step.k_PHSD.shape[3]
    num_tokens, width = step.qkv_TX.shape
    heads = step.qkv_TX.reshape(num_tokens, width // head_dim, head_dim)
    qk_TXD, v_THD = heads.tensor_split((step.num_queries + num_heads,), dim=1)
    if step.q_weight_D is not None or step.k_weight_D is not None:
        q_TQD, k_THD = qk_TXD.tensor_split((step.num_queries,), dim=1)
        qk_TXD = torch.cat(
            (_norm_heads(q_TQD, step.q_weight_D, step), _norm_heads(k_THD, step.k_weight_D, step)), 1
        )
    cos, sin = (table.index_select(0, step.positions_T) for table in (step.cos, step.sin))
    q_TQD, k_THD = rotate(qk_TXD, cos, sin).tensor_split((step.num_queries,), dim=1)
    places = _Places.of(step.slots_T, step.k_PHSD.shape[2])
    _store(k_THD, places, step.k_PHSD, step.k_scale)
    _store(v_THD, places, step.v_PHSD, step.v_scale)
    return q_TQD.contiguous()


def rotate(x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Rotate the pairs (i, i + R / 2) in float32; cos_TR, sin_TR: [T, R / 2]."""
    half = cos_TR.shape[1]
    cos_TR, sin_TR = cos_TR.unsqueeze(1), sin_TR.unsqueeze(1)
    first, second, rest = x_THD.float().tensor_split((half, 2 * half), dim=2)
    turned = (first * cos_TR - second * sin_TR, second * cos_TR + first * sin_TR, rest)
    return torch.cat(turned, dim=2).to(x_THD.dtype)


def append(x_THD: Tensor, slots_T: Tensor, page_PHSD: Tensor, scale: Tensor | None) -> None:
    """Store the tokens that have a slot; scale: None, [H], or [P, H, S], which is written."""
    _store(x_THD, _Places.of(slots_T, page_PHSD.shape[2]), page_PHSD, scale)


class _Places(NamedTuple):
    """Where tokens go. is_kept_T: which have a slot, None: all; block, slot: of those that have."""

    is_kept_T: Tensor | None
    block_T: Tensor
    slot_T: Tensor

    @classmethod
    def of(cls, slots_T: Tensor, block_size: int) -> "_Places":
        is_kept_T = None
        if slots_T.shape[0] and int(slots_T.min()) < 0:
            is_kept_T = slots_T >= 0
            slots_T = slots_T[is_kept_T]
        slots_T = slots_T.long()
        return cls(is_kept_T, slots_T // block_size, slots_T % block_size)


def _store(x_THD: Tensor, places: _Places, page_PHSD: Tensor, scale: Tensor | None) -> None:
    is_kept_T, block_T, slot_T = places
    if is_kept_T is not None:
        x_THD = x_THD[is_kept_T]
    if scale is None:
        page_PHSD[block_T, :, slot_T] = x_THD
        return
    if scale.ndim == 3:
        scale_TH = nonzero(x_THD.abs().amax(dim=2) / LARGEST_CODE[page_PHSD.dtype])
        scale[block_T, :, slot_T] = scale_TH.float()
    else:
        scale_TH = scale.to(x_THD.dtype).expand(x_THD.shape[0], -1)
    codes_THD = nearest(x_THD / scale_TH.unsqueeze(2), page_PHSD.dtype)
    page_PHSD.view(torch.int8)[block_T, :, slot_T] = codes_THD.view(torch.int8)  # float8 cannot be indexed


def _norm_heads(x_THD: Tensor, weight_D: Tensor | None, step: Append) -> Tensor:
    if weight_D is None:
        return x_THD
    norm = Norm(weight_D, step.eps, step.plus_one)
    return norm_rows(x_THD.reshape(-1, x_THD.shape[2]), None, norm).view(x_THD.shape)


def _fake(*arguments: Any) -> Tensor:
    step = Append(*arguments)
    return step.qkv_TX.new_empty(step.qkv_TX.shape[0], step.num_queries, step.k_PHSD.shape[3])


@operator(
    "rope_append", cpu=rotate_and_append, fake=_fake, mutates=("k_PHSD", "v_PHSD", "k_scale", "v_scale")
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
    """Rotated queries [T, Q, D] in the dtype of qkv; keys and values are in their slots afterwards. See `Append`."""
    from quantkit_kernels import rope_kernel

    norms = (q_weight_D, k_weight_D, eps, plus_one)
    pages = (k_PHSD, v_PHSD, k_scale, v_scale)
    return rope_kernel.launch(Append(qkv_TX, positions_T, cos, sin, slots_T, *norms, *pages))
