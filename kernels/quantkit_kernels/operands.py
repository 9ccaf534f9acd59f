"""What operators say about tensors that kernels read by bare pointers: a wrong one would be read all the same.

These run in front of every launch outside of graphs: half a microsecond each. Words are made only where one fails, and
`len(tensor)` and `tensor.stride(0)`, 0.5 and 0.2 us, are not asked.

Shape suffixes: M rows, N out_features, K in_features.
"""

import torch
from torch import Tensor

from quantkit_kernels.repack import BLOCK_COLUMNS, STRIP_ROWS

GROUPS = (32, 64, 128)  # columns that may share a scale
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
FLOAT32, INT32, INT8 = (torch.float32,), (torch.int32,), (torch.int8,)
ROW_BYTES = 16  # rows of codes start at multiples of these, and are padded to such a length


def check_part(
    name: str,
    tensor: Tensor | None,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...],
    device: torch.device,
) -> None:
    """A contiguous tensor of this shape, of one of these dtypes, on this device."""
    assert (
        tensor is not None
        and tensor.dtype in dtypes
        and tensor.shape == shape
        and tensor.device == device
        and tensor.is_contiguous()
    ), f"{name}: expected {_names(dtypes)} {shape}, contiguous, on {device}; found {_words(tensor)}"


def check_rows(codes_NK: Tensor, dtypes: tuple[torch.dtype, ...], num_cols: int, device: torch.device) -> int:
    """A weight in rows, each padded to a multiple of 16 bytes, for x of so many columns; the number of its rows."""
    (num_rows, padded), (step, between), size = codes_NK.shape, codes_NK.stride(), codes_NK.element_size()
    assert (
        codes_NK.dtype in dtypes
        and codes_NK.device == device
        and between == 1
        and step * size % ROW_BYTES == 0
        and num_cols <= padded < num_cols + ROW_BYTES // size
    ), f"weights: expected rows of {num_cols} {_names(dtypes)}, padded, on {device}; found {_words(codes_NK)}"
    return num_rows


def check_fragments(packed: Tensor, n: int, k: int, device: torch.device) -> None:
    """INT4 codes of a `StripWeight` [N, K]."""
    check_part("fragments", packed, INT32, (-(-n // STRIP_ROWS), -(-k // BLOCK_COLUMNS), 32, 4), device)


def check_scales(
    scale: Tensor | None, zero_point: Tensor | None, n: int, k: int, group: int, device: torch.device
) -> None:
    """Of a `StripWeight` [N, K] in groups of columns, or with group 0 one scale per row."""
    assert group == 0 or group in GROUPS, f"groups of {group} columns, not of {GROUPS}"
    shape = (-(-n // STRIP_ROWS), -(-k // group), 16) if group else (n,)
    check_part("scales", scale, FLOATS if group else FLOAT32, shape, device)
    if zero_point is not None:
        assert group, "zero points are in groups"
        check_part("zero points", zero_point, INT8, shape, device)


def check_codes(codes_MK: Tensor, dtypes: tuple[torch.dtype, ...], out_dtype: torch.dtype) -> None:
    """x in codes, and what is asked of the product."""
    assert codes_MK.dtype in dtypes and codes_MK.ndim == 2 and codes_MK.stride()[1] == 1, (
        f"x: expected rows of {_names(dtypes)}, columns next to each other; found {_words(codes_MK)}"
    )
    assert out_dtype in FLOATS, f"no output in {out_dtype}"


def check_scale_of_rows(
    x_scale: Tensor, zero_point: Tensor | None, num_rows: int, device: torch.device
) -> None:
    """Of x in codes: one for each row, or one for all."""
    shape = x_scale.shape
    assert (
        x_scale.dtype == torch.float32
        and (shape == (num_rows, 1) or shape == (1,))
        and x_scale.device == device
    ), f"scales of x: expected float32 ({num_rows}, 1) or (1,) on {device}; found {_words(x_scale)}"
    assert zero_point is None or (
        zero_point.dtype == torch.int8 and zero_point.shape == shape and zero_point.device == device
    ), f"zero points of x: expected int8 {tuple(shape)} on {device}; found {_words(zero_point)}"


def check_bias(
    bias_N: Tensor | None, dtypes: tuple[torch.dtype, ...], num_outputs: int, device: torch.device
) -> None:
    """One for each output, or none."""
    if bias_N is not None:
        check_part("bias", bias_N, dtypes, (num_outputs,), device)


def _words(tensor: Tensor | None) -> str:
    if tensor is None:
        return "none"
    return f"{_names((tensor.dtype,))} {tuple(tensor.shape)} by {tensor.stride()} on {tensor.device}"


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
