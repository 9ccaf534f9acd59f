"""RMS norm, with what happens around it: the residual is added before, and codes are made of the result.

Shape suffixes: T tokens, E hidden size.
"""

from torch import Tensor

from quantkit.runtime.layers.rows import CodedRows, Rows, encode
from quantkit_kernels.norm_quant import Norm, rms_norm, rms_norm_codes
from quantkit_kernels.operators import for_device
from quantkit_kernels.row_codes import Codes


class RMSNorm:
    """x / rms(x), times a weight; the statistics are float32.

    Two roundings exist: w · round(x̂), or, with `plus_one`, round(x̂ · (1 + w)) for a stored w around 0. inner_E: weight
    of a norm of x by itself, before the residual is added (what stands behind a sandwiched sublayer).
    """

    def __init__(
        self, weight_E: Tensor, eps: float, *, plus_one: bool = False, inner_E: Tensor | None = None
    ) -> None:
        self.norm = Norm(weight_E, eps, plus_one, inner_E)
        self._rms_norm = for_device(rms_norm, weight_E.device)
        self._rms_norm_codes = for_device(rms_norm_codes, weight_E.device)

    def __call__(
        self, x_TE: Tensor, residual_TE: Tensor | None, codes: Codes | None = None
    ) -> tuple[Rows, Tensor]:
        """The norm of x + residual (as codes, if asked for), and that sum, which is where the residual was.

        Without a residual x itself is the sum; it must not be needed by anyone else, since the next norm adds to it.
        """
        rows: Rows
        if codes is None:
            rows = self._rms_norm(x_TE, residual_TE, *self.norm)
        else:
            rows = CodedRows(*self._rms_norm_codes(x_TE, residual_TE, *self.norm, *codes))
        return rows, x_TE if residual_TE is None else residual_TE


class SumOfNorm:
    """The norm of x by itself added to the residual, and nothing more: where the norms stand behind attention and MLP.

    inner_E: its weight, None in front of the first layer, where there is nothing to add.
    """

    def __init__(self, inner_E: Tensor | None, eps: float, *, plus_one: bool = False) -> None:
        self.norm = None if inner_E is None else Norm(inner_E, eps, plus_one)

    def __call__(
        self, x_TE: Tensor, residual_TE: Tensor | None, codes: Codes | None = None
    ) -> tuple[Rows, Tensor]:
        """The sum (as codes, if asked for), and the sum, which is where the residual was."""
        if residual_TE is None:
            sum_TE = x_TE
        else:
            assert self.norm is not None, "what is added to a residual has a norm"
            sum_TE = residual_TE.add_(rms_norm(x_TE, None, *self.norm))
        return sum_TE if codes is None else encode(sum_TE, codes), sum_TE
