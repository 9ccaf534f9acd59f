"""The sparse feed-forward part of a decoder layer: a router, and experts of which each token goes to a few.

    x [T, E] ─► router ─► softmax, the largest S ─► experts, weights [T, S]
        └─────► gate_up of those experts ─► act(gate) · up ─► down ─► Σ weight · y ─► [T, E]

The router's scores and the weights are float32; the router itself is a linear like others. Experts run in one of two
ways: on a GPU all in one product for gate and up and one for down (`GroupedExperts`), whatever goes where, so that a
CUDA graph can hold them; elsewhere one after another, those alone that a token goes to (`ExpertByExpert`).

Shape suffixes: T tokens, E hidden size, X experts, S experts of a token, P pairs of both, F intermediate features.
"""

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from quantkit.runtime.layers.mlp import Activation, GatedMLP
from quantkit.runtime.layers.rows import AnyLinear, CodedRows, Rows, encode
from quantkit_kernels import moe
from quantkit_kernels.moe import ExpertWeight
from quantkit_kernels.moe_routing import choose_experts, combine, sort_by_expert
from quantkit_kernels.operators import for_device
from quantkit_kernels.row_codes import Codes
from quantkit_kernels.silu_quant import gated_activation, gated_activation_codes

FIXED_ROWS = 16  # of a tile, where no batch may change a row's bits


class Experts(Protocol):
    """All experts of a layer."""

    def __call__(self, x_TE: Tensor, expert_TS: Tensor, weight_TS: Tensor, /) -> Tensor:
        """[T, E] to [T, E]: the sum of what each token's experts give, times their weights."""
        ...


class ExpertByExpert:
    """Experts as MLPs of their own, in the order of their numbers."""

    def __init__(self, experts: Iterable[GatedMLP]) -> None:
        self.experts = list(experts)

    def __call__(self, x_TE: Tensor, expert_TS: Tensor, weight_TS: Tensor) -> Tensor:
        """[T, E] to [T, E]; sums in float32."""
        sum_TE = torch.zeros_like(x_TE, dtype=torch.float32)
        expert_P, weight_P1 = expert_TS.flatten(), weight_TS.reshape(-1, 1)
        counts = torch.bincount(expert_P, minlength=len(self.experts)).tolist()
        pairs_of_experts = torch.split(expert_P.argsort(stable=True), counts)
        for expert, pairs in zip(self.experts, pairs_of_experts, strict=True):
            if len(pairs):
                token = pairs // expert_TS.shape[1]
                sum_TE.index_add_(0, token, expert(x_TE[token]).float() * weight_P1[pairs])
        return sum_TE.to(x_TE.dtype)


class GroupedExperts:
    """All experts of a layer in grouped products.

    input_codes: what both products read, None: rows in 16 bits.
    """

    def __init__(
        self,
        gate_up: ExpertWeight,
        down: ExpertWeight,
        activation: Activation,
        *,
        input_codes: Codes | None,
        batch_invariant: bool,
    ) -> None:
        self.gate_up, self.down = gate_up, down
        self.activation = activation
        self.input_codes = input_codes
        self.batch_invariant = batch_invariant

    def __call__(self, x_TE: Tensor, expert_TS: Tensor, weight_TS: Tensor) -> Tensor:
        """[T, E] to [T, E]."""
        num_pairs, dtype, device = expert_TS.numel(), x_TE.dtype, x_TE.device
        rows = FIXED_ROWS if self.batch_invariant else moe.rows_for(num_pairs, self.gate_up)
        tiles = for_device(sort_by_expert, device)(expert_TS, len(self.gate_up.stored), rows)
        x = x_TE if self.input_codes is None else encode(x_TE, self.input_codes)
        gate_up_PF = moe.multiply(*_with_scale(x), self.gate_up, *tiles, num_pairs, dtype)
        y_PE = moe.multiply(*_with_scale(self._activated(gate_up_PF)), self.down, *tiles, num_pairs, dtype)
        return for_device(combine, device)(y_PE, weight_TS, dtype)

    def _activated(self, gate_up_PF: Tensor) -> Rows:
        if self.input_codes is None:
            return for_device(gated_activation, gate_up_PF.device)(gate_up_PF, self.activation)
        activate = for_device(gated_activation_codes, gate_up_PF.device)
        return CodedRows(*activate(gate_up_PF, self.activation, *self.input_codes))


class SharedExpert:
    """An MLP that every token goes to, times the sigmoid of a gate."""

    def __init__(self, mlp: GatedMLP, gate: AnyLinear) -> None:
        self.mlp = mlp
        self.gate = gate

    def __call__(self, x_TE: Tensor) -> Tensor:
        """[T, E] to [T, E]."""
        result: Tensor = torch.sigmoid(self.gate(x_TE)) * self.mlp(x_TE)
        return result


class SparseMLP:
    """Router and experts, and what a shared one adds to theirs.

    is_normalized: the weights of a token's experts are divided by their sum.
    """

    input_codes = None  # the router reads 16 bits

    def __init__(
        self,
        router: AnyLinear,
        experts: Experts,
        shared: SharedExpert | None = None,
        *,
        num_per_token: int,
        is_normalized: bool,
    ) -> None:
        self.router = router
        self.experts = experts
        self.shared = shared
        self.num_per_token = num_per_token
        self.is_normalized = is_normalized

    def __call__(self, x: Rows) -> Tensor:
        """[T, E] to [T, E]."""
        assert isinstance(x, Tensor), "no codes were asked for"
        choose = for_device(choose_experts, x.device)
        expert_TS, weight_TS = choose(self.router(x), self.num_per_token, self.is_normalized)
        result: Tensor = self.experts(x, expert_TS, weight_TS)
        return result if self.shared is None else result + self.shared(x)


def _with_scale(x: Rows) -> tuple[Tensor, Tensor | None]:
    return (x, None) if isinstance(x, Tensor) else x
