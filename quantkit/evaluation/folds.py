"""What a candidate's maker moved from one weight into the next, so that a linear of it fits into the original.

AWQ and SmoothQuant divide the channels that a norm, the values or a gated product give, and multiply the weights that
read them; tuning changes norms. The model computes the same, a linear of it by itself does not:

    y = candidate(x · inputs) · outputs         in the original's terms

Shape suffixes: N out_features, K in_features, C channels between two linears.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.arch.pairs import Heads, LayerWiring, Link, Pair
from quantkit.calibration.folding import NORM_OFFSET, by_query_head

LEAST_SPREAD = 0.15  # of a fold's logarithm over channels; quantizing to 4 bits gives a tenth of it

ReadNorm = Callable[[str], tuple[Tensor, Tensor]]  # the original's and the candidate's weight


class Fold(NamedTuple):
    """Factors of a candidate's linear; None: 1."""

    inputs_K: Tensor | None = None
    outputs_N: Tensor | None = None

    def inverse(self) -> "Fold":
        """Of the original's linear in the candidate's terms."""
        return Fold(*(None if factor is None else 1 / factor for factor in self))


class Folds:
    """Those of a model, found layer by layer: `of` a linear, by name."""

    def __init__(self, heads: Heads) -> None:
        self.of: dict[str, Fold] = {}
        self._heads = heads
        self._pairs: dict[str, tuple[Pair, str]] = {}

    def add_norms(self, wiring: LayerWiring, read: ReadNorm) -> None:
        """Linears that read a norm: exactly the ratio of the two weights."""
        for pair in wiring.pairs:
            if pair.link not in NORM_OFFSET:
                self._pairs[wiring.prefix + pair.prev] = pair, wiring.prefix
                continue
            original_K, candidate_K = read(f"{wiring.prefix}{pair.prev}.weight")
            if not torch.equal(original_K, candidate_K):
                offset = NORM_OFFSET[pair.link]
                ratio_K = (candidate_K + offset) / (original_K + offset)
                self._add(wiring.prefix, pair, Fold(inputs_K=ratio_K))

    def add_linear(self, name: str, original_NK: Tensor, candidate_NK: Tensor) -> None:
        """A linear whose rows were perhaps divided, and those that read it: by least squares, row by row.

        A factor that all rows share is damage, and no fold: only factors that differ clearly from channel to channel
        count. Norms of its layer come first.
        """
        if name not in self._pairs:
            return
        pair, prefix = self._pairs[name]
        fold = self.of.get(name, Fold())
        if fold.inputs_K is not None:
            candidate_NK = candidate_NK * fold.inputs_K
        ratio_N = (original_NK * candidate_NK).sum(dim=1) / original_NK.square().sum(dim=1)
        ratio_C = ratio_N[-self._num_channels(pair, len(ratio_N)) :]
        if bool((ratio_C > 0).all()) and float(ratio_C.log().std()) > LEAST_SPREAD:
            outputs_N = torch.cat((torch.ones_like(ratio_N[: -len(ratio_C)]), 1 / ratio_C))
            self.of[name] = fold._replace(outputs_N=outputs_N)
            is_values = pair.link is Link.VALUES
            self._add(
                prefix, pair, Fold(inputs_K=by_query_head(ratio_C, self._heads) if is_values else ratio_C)
            )

    def _add(self, prefix: str, pair: Pair, fold: Fold) -> None:
        self.of |= {prefix + name: fold for name in pair.to}

    def _num_channels(self, pair: Pair, num_rows: int) -> int:
        """The last rows of `prev`, which feed `to`; rows before them belong to what it is fused with."""
        if pair.link is Link.VALUES:
            return self._heads.num_kv * self._heads.dim
        return num_rows // 2 if pair.prev.endswith("gate_up_proj") else num_rows
