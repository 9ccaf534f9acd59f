"""The gated feed-forward part of a decoder layer."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

from torch import Tensor, nn

Activation = Literal["silu", "gelu_tanh"]
ACTIVATIONS: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu_tanh": partial(nn.functional.gelu, approximate="tanh"),
}


class GatedMLP(nn.Module):
    """down(act(gate(x)) · up(x))."""

    def __init__(
        self, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module, activation: Activation
    ) -> None:
        super().__init__()
        self.gate_proj = gate_proj
        self.up_proj = up_proj
        self.down_proj = down_proj
        self.activation = activation

    def forward(self, hidden_TE: Tensor) -> Tensor:
        """[T, E] to [T, E]."""
        gate = self.gate_proj(hidden_TE)
        result: Tensor = self.down_proj(ACTIVATIONS[self.activation](gate) * self.up_proj(hidden_TE))
        return result
