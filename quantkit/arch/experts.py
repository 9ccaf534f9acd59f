"""Where a layer's experts are: one module of fused 3-D weights in transformers, 2-D weights by number on disk.

The module is called with (hidden [T, E], experts [T, A], weights [T, A]): every token goes to A experts. It
holds `gate_up_proj` [X, 2·I, E], gate rows first, `down_proj` [X, E, I], and the activation `act_fn`; an
expert computes down · (act_fn(gate · x) * (up · x)). Checked against transformers 5.23.

Shape suffixes: T tokens, E hidden size, A experts of one token, X experts, I inner size.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertNames:
    """Names below the layer: `module` in transformers, `on_disk` + ".{number}." + gate, up or down on disk."""

    module: str = "mlp.experts"
    on_disk: str = "mlp.experts"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"

    def linear(self, expert: int, part: str) -> str:
        """The name on disk of one expert's linear; part: one of `gate`, `up`, `down`."""
        return f"{self.on_disk}.{expert}.{part}"


EXPERTS: Mapping[str, ExpertNames] = {
    "mixtral": ExpertNames(on_disk="block_sparse_moe.experts", gate="w1", up="w3", down="w2"),
    "olmoe": ExpertNames(),
    "qwen2_moe": ExpertNames(),
    "qwen3_moe": ExpertNames(),
}
