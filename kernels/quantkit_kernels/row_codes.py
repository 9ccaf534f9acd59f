"""Rows of activations as INT8 or FP8 codes with float32 scales.

    x [T, K]   ->   codes [T, K], one byte each      scale [T, G], float32

    dynamic    G = 1, or K / group: amax of those columns / 127.5 (INT8) or / 448 (e4m3), a zero scale becomes eps
    static     one stored scale (and zero point) for all; every row of `scale` holds it

Each step is rounded to the dtype of x, as the runtime's reference does: scale, x / scale, and what the zero point makes
of it. So a scale in float32 is exactly a number of x's dtype, and the codes do not depend on which kernel chose them.

Shape suffixes: T tokens, K features, G groups of features that share a scale.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from quantkit_kernels.operands import FLOATS
from quantkit_kernels.operators import operator

HALF_RANGE = {torch.int8: 127.5, torch.float8_e4m3fn: 448.0}
MAX_FEATURES = 65536  # that a program holds


class Codes(NamedTuple):
    """How rows become codes.

    dtype: int8 or float8_e4m3fn. group: features that share a dynamic scale, a power of two that divides K; 0: all of a
    row. static_scale [1]: stored, makes it static; zero_point [1]: int8, for INT8 with a static scale.
    """

    dtype: torch.dtype
    group: int = 0
    static_scale: Tensor | None = None
    zero_point: Tensor | None = None

    @property
    def is_float8(self) -> bool:
        """Whether codes are e4m3 values."""
        return self.dtype == torch.float8_e4m3fn

    @property
    def half_range(self) -> float:
        """amax over the dynamic scale."""
        return HALF_RANGE[self.dtype]

    def check(self, num_features: int) -> None:
        """What the class says about its fields."""
        group, scale, zero = self.group, self.static_scale, self.zero_point
        assert self.dtype in HALF_RANGE, f"codes of {self.dtype}"
        assert group == 0 or (group & (group - 1) == 0 and num_features % group == 0), (
            f"{num_features} by {group}"
        )
        assert scale is None or (scale.numel() == 1 and group == 0), "a static scale is one number"
        assert zero is None or (scale is not None and not self.is_float8 and zero.numel() == 1), (
            "a zero point goes with a static INT8 scale"
        )

    def empty(self, like: Tensor, num_features: int) -> tuple[Tensor, Tensor]:
        """Codes and scales of as many rows as `like` has, to be written."""
        num_groups = num_features // self.group if self.group else 1
        return (
            like.new_empty(like.shape[0], num_features, dtype=self.dtype),
            like.new_empty(like.shape[0], num_groups, dtype=torch.float32),
        )


def encode_rows(x_TK: Tensor, codes: Codes) -> tuple[Tensor, Tensor]:
    """`quantize_rows` in plain torch, step by step in the dtype of x."""
    check_rows(x_TK)
    codes.check(x_TK.shape[1])
    num_rows, num_features = x_TK.shape
    group = codes.group or num_features
    tiles_TGK = x_TK.reshape(num_rows, num_features // group, group)
    if codes.static_scale is None:
        scale = nonzero(tiles_TGK.abs().amax(dim=-1, keepdim=True) / codes.half_range)
    else:
        scale = codes.static_scale.to(x_TK.dtype).repeat(len(x_TK), 1, 1)
    scaled = tiles_TGK / scale
    if codes.zero_point is not None:
        scaled = scaled + codes.zero_point.to(x_TK.dtype)
    return nearest(scaled, codes.dtype).flatten(1), scale[..., 0].float()


def nearest(scaled: Tensor, code_dtype: torch.dtype) -> Tensor:
    """Codes of x / scale, saturating."""
    if code_dtype == torch.float8_e4m3fn:
        return scaled.clamp(-448, 448).to(code_dtype)
    return scaled.clamp(-128, 127).round().to(code_dtype)


def nonzero(scale: Tensor) -> Tensor:
    """Scales, eps of their dtype where there was nothing but zeros."""
    return scale.masked_fill(scale == 0, torch.finfo(scale.dtype).eps)


def check_rows(x: Tensor) -> None:
    """A matrix that a program can read a row of."""
    assert x.dtype in FLOATS, f"x of {x.dtype}"
    assert x.ndim == 2 and x.stride(1) == 1, f"rows of contiguous features, not {x.shape} by {x.stride()}"
    assert x.shape[1] <= MAX_FEATURES, f"{x.shape[1]} features, more than {MAX_FEATURES}"


def _encode(
    x_TK: Tensor, code_dtype: torch.dtype, group: int, static_scale: Tensor | None, zero_point: Tensor | None
) -> tuple[Tensor, Tensor]:
    return encode_rows(x_TK, Codes(code_dtype, group, static_scale, zero_point))


def _fake(x_TK: Tensor, code_dtype: torch.dtype, group: int, *_: object) -> tuple[Tensor, Tensor]:
    return Codes(code_dtype, group).empty(x_TK, x_TK.shape[1])


@operator("quantize_rows", cpu=_encode, fake=_fake)
def quantize_rows(
    x_TK: Tensor, code_dtype: torch.dtype, group: int, static_scale: Tensor | None, zero_point: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Codes [T, K] and their scale, float32 [T, G], as `Codes` says. x_TK: bf16, fp16 or fp32, features contiguous."""
    from quantkit_kernels import row_codes_kernel

    return row_codes_kernel.launch(x_TK, Codes(code_dtype, group, static_scale, zero_point))
