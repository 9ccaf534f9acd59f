"""Every expert of a layer calibrated on the tokens that reach it, or on all tokens where too few do.

The caller keeps what the module of experts is called with; then the experts are treated one after the other, so
that one expert's statistics are in memory at a time, not all of them. What is rounded how is the caller's, too:
this module knows tokens and experts, neither schemes nor algorithms.

Shape suffixes: T tokens, E hidden size, A experts of one token, N, K of a linear.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from quantkit.arch.experts import ExpertNames
from quantkit.observers import InputStats

STARVED_BELOW = 16  # an expert that sees fewer than in_features / 16 tokens is starved


class Routed(NamedTuple):
    """One call of a module of experts: its input, and the experts that each token goes to."""

    hidden_TE: Tensor
    experts_TA: Tensor

    def of(self, expert: int) -> Tensor:
        """The rows that reach this expert, in order."""
        return self.hidden_TE[(self.experts_TA == expert).any(dim=-1)]


class Coverage(NamedTuple):
    """Tokens that the router sent to each expert, and the experts that were calibrated on all tokens instead."""

    num_tokens: tuple[int, ...]
    starved: tuple[int, ...]


def coverage(calls: Sequence[Routed], num_experts: int, in_features: int) -> Coverage:
    """Who is starved: reached by fewer than in_features / STARVED_BELOW tokens.

    With so few, a Hessian knows less than a sixteenth of its directions, and rounding bends the others to fit
    these tokens. Tokens of other experts are a worse sample of the input, but a full one.
    """
    counts = torch.zeros(num_experts, dtype=torch.int64)
    for call in calls:
        counts += torch.bincount(call.experts_TA.flatten().cpu(), minlength=num_experts)
    few = [expert for expert, count in enumerate(counts) if count * STARVED_BELOW < in_features]
    return Coverage(tuple(counts.tolist()), tuple(few))


@torch.no_grad()
def round_experts(
    module: nn.Module,
    names: ExpertNames,
    calls: Sequence[Routed],
    *,
    new_stats: Callable[[int], InputStats],
    round_linears: Callable[[Mapping[str, Tensor], InputStats], Mapping[str, Tensor]],
) -> Coverage:
    """Round gate and up of each expert, then down on what the rounded two give it; in place.

    module: as `arch.experts` describes it, with its weights. new_stats: statistics of an input of that many
    features. round_linears: weights [N, K] of linears that share an input, by names on disk below the layer,
    and its statistics -> what each will be when dequantized, [N, K]; given back as they came, they are only
    observed. Called once per expert for gate and up, once for down, in the order of experts.
    """
    # detached: what threads compute of it would need no_grad anew
    gate_up = module.get_parameter("gate_up_proj").detach()
    down = module.get_parameter("down_proj").detach()
    activation = module.get_submodule("act_fn")
    num_experts, hidden_size, inner_size = down.shape
    found = coverage(calls, num_experts, max(hidden_size, inner_size))
    all_tokens = _observed((call.hidden_TE for call in calls), new_stats(hidden_size), gate_up)
    for expert in range(num_experts):
        is_starved = expert in found.starved
        rows = [call.hidden_TE if is_starved else call.of(expert) for call in calls]
        stats = all_tokens if is_starved else _observed(rows, new_stats(hidden_size), gate_up)
        names_in = [names.linear(expert, names.gate), names.linear(expert, names.up)]
        halves = gate_up[expert].chunk(2)
        rounded = round_linears(dict(zip(names_in, halves, strict=True)), stats)
        gate_up[expert] = torch.cat([rounded[name] for name in names_in])

        inner = (_inner(x_TE.to(gate_up), gate_up[expert], activation) for x_TE in rows)
        stats = _observed(inner, new_stats(inner_size), down)
        name = names.linear(expert, names.down)
        down[expert] = round_linears({name: down[expert]}, stats)[name]
    return found


def _observed(inputs: Iterable[Tensor], stats: InputStats, weights: Tensor) -> InputStats:
    for x_TK in inputs:
        if len(x_TK):
            stats.add(x_TK.to(weights))
    return stats


def _inner(x_TE: Tensor, gate_up: Tensor, activation: nn.Module) -> Tensor:
    """The input of down_proj: act(gate · x) * (up · x)."""
    gate, up = linear(x_TE, gate_up).chunk(2, dim=-1)
    inner: Tensor = activation(gate) * up
    return inner
