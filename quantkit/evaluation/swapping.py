"""Two models in one decoder: each linear is the original's or the candidate's, as chosen before a run.

One of them is the base, and units are swapped into it from the other. All is computed in float32, so that a difference
comes from weights and quantized inputs alone. Norms are the base's.

Shape suffixes: T tokens, N out_features, K in_features.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from quantkit.arch.pairs import Heads, layer_wiring
from quantkit.errors import EvaluationError
from quantkit.evaluation.folds import Fold, Folds
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.quantization_config import read_quantization
from quantkit.runtime.heap import release_freed_memory
from quantkit.runtime.layers.build_linear import build_linear
from quantkit.runtime.layers.linear_part import LinearPart
from quantkit.runtime.layers.mlp import Activation
from quantkit.runtime.layers.moe import Experts
from quantkit.runtime.layers.rows import AnyLinear, Rows
from quantkit.runtime.models.families import read_spec
from quantkit.runtime.target import Target
from quantkit.runtime.weights import Weights
from quantkit_kernels import dequantize
from quantkit_kernels.row_codes import Codes

ROTATED = 0.5  # of the embedding's norm: quantizing it never changes so much


class Choice:
    """Whose linears the next run has: those of the base, but for units swapped in from the other."""

    def __init__(self) -> None:
        self.base_is_candidate = False
        self.swapped: frozenset[str] = frozenset()


class SwapLinear:
    """Linears of one input side by side, each of either model.

    columns: of each in the output. folds: of the candidate's that do not fit the original as they are.
    """

    input_codes: Codes | None = None

    def __init__(
        self,
        original: AnyLinear,
        candidate: AnyLinear,
        columns: Mapping[str, slice],
        folds: Mapping[str, Fold],
        choice: Choice,
    ) -> None:
        self.original, self.candidate = original, candidate
        self.columns, self.folds = columns, folds
        self.choice = choice

    def __call__(self, x: Rows) -> Tensor:
        """[T, K] to [T, N]."""
        assert isinstance(x, Tensor), "float32 has no codes"
        y_TN = (self.candidate if self.choice.base_is_candidate else self.original)(x)
        for name in self.columns.keys() & self.choice.swapped:
            y_TN[:, self.columns[name]] = self._of_other(x, name)
        return y_TN

    def _of_other(self, x_TK: Tensor, name: str) -> Tensor:
        """What the other model's linear gives in the base's terms."""
        is_candidate = not self.choice.base_is_candidate
        fold = self.folds.get(name, Fold())
        inputs_K, outputs_N = fold if is_candidate else fold.inverse()
        linear = self.candidate if is_candidate else self.original
        y_TN = linear(x_TK if inputs_K is None else x_TK * inputs_K)[:, self.columns[name]]
        return y_TN if outputs_N is None else y_TN * outputs_N


class SwapExperts:
    """All experts of a layer, of either model."""

    def __init__(self, original: Experts, candidate: Experts, name: str, fold: Fold, choice: Choice) -> None:
        self.original, self.candidate = original, candidate
        self.name, self.fold = name, fold
        self.choice = choice

    def __call__(self, x_TE: Tensor, expert_TS: Tensor, weight_TS: Tensor) -> Tensor:
        """As `Experts`."""
        is_swapped = self.name in self.choice.swapped
        is_candidate = self.choice.base_is_candidate != is_swapped
        if is_swapped and self.fold.inputs_K is not None:
            x_TE = x_TE * self.fold.inputs_K if is_candidate else x_TE / self.fold.inputs_K
        return (self.candidate if is_candidate else self.original)(x_TE, expert_TS, weight_TS)


class PairedWeights(Weights):
    """The tensors of two checkpoints of one architecture, as `build_decoder` asks for them.

    units: what differs and can be swapped, in the order of the computation: linears, a layer's experts, the embedding.
    Raises EvaluationError where the weights of one mean nothing in the other.
    """

    def __init__(self, original: Checkpoint, candidate: Checkpoint, target: Target) -> None:
        super().__init__(original, read_quantization(original.config), target)
        spec, other = (replace(read_spec(side), max_positions=0) for side in (original, candidate))
        if spec != other:
            raise _unfit(candidate, "its config.json describes another computation")
        self.units: list[str] = []
        self.choice = Choice()
        self._original, self._candidate = original, candidate
        self._sides = [
            Weights(side, read_quantization(side.config), target) for side in (original, candidate)
        ]
        self._changing: dict[str, tuple[Tensor, ...]] = {}  # what is in use, the original's, the candidate's
        self._folds = Folds(Heads(spec.num_heads, spec.num_kv_heads, spec.head_dim))

    def select(self, swapped: Collection[str], *, base_is_candidate: bool) -> None:
        """Choose the base of the next run, and what is swapped into it."""
        self.choice.base_is_candidate, self.choice.swapped = base_is_candidate, frozenset(swapped)
        for module, (in_use, original, candidate) in self._changing.items():
            in_use.copy_(candidate if base_is_candidate != (module in swapped) else original)

    def begin_layer(self, number: int) -> None:
        """As the base class; finds what was folded into the layer's norms."""
        release_freed_memory()
        self._folds.add_norms(layer_wiring(self._original, number), self._both)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A norm or the embedding: what it holds follows `select`, where the two differ."""
        original, candidate = self._both(name)
        assert original.shape == candidate.shape == shape, "both have been loaded before"
        if torch.equal(original, candidate):
            return original
        module = name.removesuffix(".weight")
        if module.endswith("embed_tokens"):
            if (original - candidate).norm() > ROTATED * original.norm():
                raise _unfit(
                    self._candidate, "its embedding is another one, as if its hidden states were rotated"
                )
            self.units.append(module)
        self._changing[module] = original.clone(), original, candidate
        return self._changing[module][0]

    def linear(self, modules: Mapping[str, int], num_cols: int, *, has_bias: bool) -> AnyLinear:
        """Linears that follow `select`."""
        parts = [
            [
                side.part(self._its_name(side, name), rows, num_cols, has_bias=has_bias)
                for name, rows in modules.items()
            ]
            for side in self._sides
        ]
        for name, *both in zip(modules, *parts, strict=True):
            if not _are_equal(*(part._replace(name=name) for part in both)):
                self.units.append(name)
                self._folds.add_linear(name, *map(_dense, both))
        columns = {
            name: slice(*ends)
            for name, ends in zip(modules, pairwise(accumulate(modules.values(), initial=0)), strict=True)
        }
        original, candidate = (build_linear(side, self.target) for side in parts)
        return SwapLinear(original, candidate, columns, self._folds.of, self.choice)

    def experts(
        self,
        gate: Sequence[str],
        up: Sequence[str],
        down: Sequence[str],
        inner: int,
        size: int,
        activation: Activation,
    ) -> Experts:
        """A layer's experts, one unit."""
        original, candidate = (
            side.experts(
                [self._its_name(side, name) for name in gate],
                [self._its_name(side, name) for name in up],
                [self._its_name(side, name) for name in down],
                inner,
                size,
                activation,
            )
            for side in self._sides
        )
        unit = down[0].rpartition(".0.")[0]
        self.units.append(unit)
        return SwapExperts(original, candidate, unit, self._folds.of.get(gate[0], Fold()), self.choice)

    def skip_tied_head(self) -> None:
        """The head is the embedding in both."""

    def finish(self) -> None:
        """Nothing to check: both have been loaded before."""

    def _both(self, name: str) -> tuple[Tensor, Tensor]:
        original, candidate = (
            side.tensor(self._its_name(side, name), checkpoint.info(self._its_name(side, name)).shape)
            for side, checkpoint in zip(self._sides, (self._original, self._candidate), strict=True)
        )
        return original, candidate

    def _its_name(self, side: Weights, name: str) -> str:
        """What a tensor or module of the original is called in one of the two, which may nest it differently."""
        if name.startswith(self.base):
            return side.base + name.removeprefix(self.base)
        return side.head + name.removeprefix(self.head)


def _are_equal(first: object, second: object) -> bool:
    """Whether two linears, or parts of them, are the same to the bit."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        is_alike = (first.shape, first.dtype) == (second.shape, second.dtype)
        return is_alike and torch.equal(_bytes(first), _bytes(second))
    if isinstance(first, tuple) and isinstance(second, tuple):
        return len(first) == len(second) and all(map(_are_equal, first, second))
    return first == second


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def _dense(part: LinearPart) -> Tensor:
    if isinstance(part.weight, Tensor):
        return part.weight
    prepared = dequantize.prepare(part.weight, torch.float32)
    return dequantize.dense_rows(prepared, 0, prepared.shape[0])


def _unfit(candidate: Checkpoint, reason: str) -> EvaluationError:
    problem = f"{candidate.path} has no map: {reason}, so none of its linears fits into the original"
    return EvaluationError(problem, fix="leave --where away")
