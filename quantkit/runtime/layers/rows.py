"""What layers hand to linears: rows of activations, or the codes that the next linear reads, with their scales.

Shape suffixes: T tokens, K in_features, G groups of features that share a scale.
"""

from typing import NamedTuple, Protocol

from torch import Tensor

from quantkit_kernels.operators import for_device
from quantkit_kernels.row_codes import Codes, quantize_rows


class CodedRows(NamedTuple):
    """INT8 or FP8 codes and their scales, float32, [T, 1] or one for each group."""

    codes_TK: Tensor
    scale_TG: Tensor


Rows = Tensor | CodedRows


class AnyLinear(Protocol):
    """y = x · wᵀ + b. input_codes: the codes that it reads, best made by who makes x; None: x itself.

    A linear that reads codes takes x all the same, and makes them.
    """

    input_codes: Codes | None

    def __call__(self, x: Rows, /) -> Tensor:
        """[T, K] to [T, N], in the dtype of the model."""
        ...


def encode(x_TK: Tensor, codes: Codes) -> CodedRows:
    """Rows as codes."""
    return CodedRows(*for_device(quantize_rows, x_TK.device)(x_TK, *codes))
