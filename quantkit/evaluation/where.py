"""Where a candidate loses: one linear at a time swapped between it and its original, and the KL measured again.

    kl_in    KL(original ‖ original with this linear of the candidate)
    kl_out   KL(original ‖ candidate) − KL(original ‖ candidate with this linear of the original)

A swap runs from its layer on: what enters each layer is kept from the run of the base, so that all swaps together take
half of the layers that they would. Behind it all is the base again, where all swaps of a layer run as one step. A whole
layer is swapped too, as a unit of kind "layer".

Shape suffixes: T tokens of all windows, E hidden size, V vocabulary.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.arch.names import place_of
from quantkit.evaluation.report import LAYER, LinearDamage
from quantkit.evaluation.swapping import PairedWeights
from quantkit.formats.checkpoint import Checkpoint
from quantkit.numerics.divergence import divergence, row_chunks
from quantkit.runtime.device_checkpoint import DeviceCheckpoint
from quantkit.runtime.load import kv_format
from quantkit.runtime.model import Cache
from quantkit.runtime.models.build import build_decoder
from quantkit.runtime.models.decoder import Decoder
from quantkit.runtime.models.families import read_spec
from quantkit.runtime.step import Row, Step, build_step
from quantkit.runtime.target import Target

EMBEDDING = "embed_tokens"

Advance = Callable[[int, int], None]  # told of how many swaps are done, and how many there are in all
State = tuple[Tensor, Tensor | None]  # x and residual between layers, whose sum is the hidden state


class Unit(NamedTuple):
    """What is swapped at once: a linear, or all parts of a layer. layer: None for embedding and output head."""

    name: str
    layer: int | None
    kind: str
    parts: tuple[str, ...]


def map_linears(
    original: Checkpoint,
    candidate: Checkpoint,
    windows: Sequence[Tensor],
    device: torch.device,
    advance: Advance,
) -> tuple[LinearDamage, ...]:
    """kl_in and kl_out of every linear that differs, and of every layer, in nats over all positions of the windows.

    windows: int64 [T] each, of one length. A layer's experts together, an output head of its own and an embedding that
    differs are units like linears. The KV cache is in float32: what quantizing it costs is not on the map. Memory: both
    models as stored but for their 16-bit tensors, which are in float32; two hidden states per layer and the original's
    logits of all positions. Raises EvaluationError where weights of one mean nothing in the other, and what loading
    raises.
    """
    with _on_device(original, device) as ours, _on_device(candidate, device) as theirs:
        weights = PairedWeights(ours, theirs, Target(device, torch.float32))
        decoder = build_decoder(read_spec(original), weights)
    # not while loading: a GPU's tensors are written by another thread, which may not touch tensors of this mode
    with torch.inference_mode():
        return _map(original, decoder, weights, windows, advance)


def _map(
    original: Checkpoint,
    decoder: Decoder,
    weights: PairedWeights,
    windows: Sequence[Tensor],
    advance: Advance,
) -> tuple[LinearDamage, ...]:
    device = weights.target.device
    units = _units(weights.units)
    runs = _Runs(decoder, weights, windows, _new_cache(original, windows, device, _most_together(units)))
    found: list[list[float]] = []
    for is_candidate in (False, True):
        base = runs.run_base(is_candidate=is_candidate)
        values: list[float] = []
        for layer, group in groupby(units, lambda unit: unit.layer):
            for together in [[unit] for unit in group] if layer is None else [list(group)]:
                swapped = runs.run_swapped(together)
                values += [base - kl if is_candidate else kl for kl in swapped]
                advance(len(together), 2 * len(units))
        found.append(values)
    return tuple(
        LinearDamage(linear=unit.name, layer=unit.layer, kind=unit.kind, kl_in=kl_in, kl_out=kl_out)
        for unit, kl_in, kl_out in zip(units, *found, strict=True)
    )


class _Runs:
    """The decoder of both models over all windows, from any layer on, for several swaps of that layer together."""

    def __init__(
        self, decoder: Decoder, weights: PairedWeights, windows: Sequence[Tensor], cache: Cache
    ) -> None:
        self._decoder, self._weights = decoder, weights
        self._windows, self._cache = windows, cache
        self._device = cache.pools[0].k_PHSD.device
        self._targets_T = torch.cat(list(windows)).to(self._device)  # whose log-probabilities nobody asks for
        self._is_candidate = False
        self._inputs: list[State] = []  # of each layer, in the run of the base
        self._reference_TV = torch.empty(0)

    def run_base(self, *, is_candidate: bool) -> float:
        """The KL of one of the two as it is. The original comes first: it is what all is compared with."""
        self._is_candidate = is_candidate
        self._select(())
        step = self._step(1)
        self._inputs = [self._embedded(step)]
        for number in range(len(self._decoder.layers)):
            self._inputs.append(self._run_layer(number, self._inputs[-1], step))
        if not is_candidate:
            self._reference_TV = self._decoder.logits(self._normed(self._inputs[-1]))
        return self._kls(self._inputs[-1])[0]

    def run_swapped(self, units: Sequence[Unit]) -> list[float]:
        """The KL of the base with one of these units of the other model: all of one layer, or one outside of them."""
        step, first, num_layers = self._step(1), units[0].layer, len(self._decoder.layers)
        if first is None:
            self._select(units[0].parts)
            is_embedding = units[0].kind == EMBEDDING
            first, state = (0, self._embedded(step)) if is_embedding else (num_layers, self._inputs[-1])
        else:
            state = self._swapped_layer(first, units, step)
            step, first = self._step(len(units)), first + 1
        for number in range(first, num_layers):
            state = self._run_layer(number, state, step)
        return self._kls(state)

    def _swapped_layer(self, number: int, units: Sequence[Unit], step: Step) -> State:
        """What the layer gives with each of the units, one below the other; from there on it is the base again."""
        states = []
        for unit in units:
            self._select(unit.parts)
            states.append(self._run_layer(number, self._inputs[number], step))
        self._select(())
        x_TE, residual_TE = (torch.cat(tensors) for tensors in zip(*states, strict=True))
        return x_TE, residual_TE

    def _run_layer(self, number: int, state: State, step: Step) -> tuple[Tensor, Tensor]:
        """A layer adds to what it gets, which is kept here."""
        x_TE, residual_TE = state
        residual_TE = None if residual_TE is None else residual_TE.clone()
        return self._decoder.layers[number](x_TE.clone(), residual_TE, step, self._cache.pools[number])

    def _kls(self, state: State) -> list[float]:
        """The mean KL of each swap."""
        found = []
        for hidden_TE in torch.split(self._normed(state), len(self._reference_TV)):
            logits_TV = self._decoder.logits(hidden_TE)
            chunks = row_chunks(len(logits_TV), logits_TV.shape[1], self._device)
            found.append(float(torch.cat([self._divergence(logits_TV, rows) for rows in chunks]).mean()))
        return found

    def _divergence(self, logits_TV: Tensor, rows: slice) -> Tensor:
        return divergence(self._reference_TV[rows], logits_TV[rows], self._targets_T[rows]).kl_R

    def _normed(self, state: State) -> Tensor:
        x_TE, residual_TE = state
        hidden_TE, _ = self._decoder.norm(x_TE, None if residual_TE is None else residual_TE.clone())
        assert isinstance(hidden_TE, Tensor), "no codes were asked for"
        return hidden_TE

    def _embedded(self, step: Step) -> State:
        return self._decoder.embedding(step.token_ids_T), None

    def _select(self, units: Sequence[str]) -> None:
        self._weights.select(units, base_is_candidate=self._is_candidate)

    def _step(self, num_swaps: int) -> Step:
        """All windows, as often as there are swaps."""
        windows = [ids_T.tolist() for _ in range(num_swaps) for ids_T in self._windows]
        rows = [Row(ids, 0, blocks) for ids, blocks in zip(windows, self._cache.blocks, strict=False)]
        return build_step(rows, block_size=self._cache.block_size, device=self._device)


def _units(names: Sequence[str]) -> list[Unit]:
    """Linears, and after those of a layer the layer."""
    units = []
    for layer, group in groupby(names, lambda name: place.layer if (place := place_of(name)) else None):
        parts = tuple(group)
        units += [Unit(name, layer, name.rpartition(".")[2], (name,)) for name in parts]
        place = place_of(parts[0])
        if place is not None:
            units.append(Unit(place.prefix.rstrip("."), layer, LAYER, parts))
    return units


def _most_together(units: Sequence[Unit]) -> int:
    """Swaps that run at once: those of a layer."""
    return max(Counter(unit.layer for unit in units).values(), default=1)


def _new_cache(
    checkpoint: Checkpoint, windows: Sequence[Tensor], device: torch.device, num_swaps: int
) -> Cache:
    kv = kv_format(checkpoint, read_spec(checkpoint), Target(device, torch.float32), "fp32")
    return Cache(kv, len(windows[0]), device, num_swaps * len(windows))


@contextmanager
def _on_device(checkpoint: Checkpoint, device: torch.device) -> Iterator[Checkpoint]:
    if device.type == "cpu":
        yield checkpoint
        return
    on_device = DeviceCheckpoint(checkpoint, device)
    try:
        yield on_device
    finally:
        on_device.close()
