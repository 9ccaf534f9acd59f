"""The gated feed-forward part of a decoder layer.

Shape suffixes: T tokens, E hidden size, F intermediate features.
"""

from typing import Literal

from torch import Tensor

from quantkit.runtime.layers.rows import AnyLinear, CodedRows, Rows
from quantkit_kernels.operators import for_device
from quantkit_kernels.row_codes import Codes
from quantkit_kernels.silu_quant import gated_activation, gated_activation_codes

Activation = Literal["silu", "gelu_tanh"]


class GatedMLP:
    """down(act(gate(x)) · up(x)); gate_up gives gate and up side by side, [T, 2F]."""

    def __init__(self, gate_up: AnyLinear, down: AnyLinear, activation: Activation) -> None:
        self.gate_up = gate_up
        self.down = down
        self.activation = activation
        self.input_codes: Codes | None = gate_up.input_codes

    def __call__(self, x: Rows) -> Tensor:
        """[T, E] to [T, E]."""
        gate_up_TF = self.gate_up(x)
        device, codes = gate_up_TF.device, self.down.input_codes
        if codes is None:
            return self.down(for_device(gated_activation, device)(gate_up_TF, self.activation))
        activate = for_device(gated_activation_codes, device)
        return self.down(CodedRows(*activate(gate_up_TF, self.activation, *codes)))
