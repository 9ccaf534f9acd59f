"""One decoder layer: its inputs observed, its linears rounded, the tokens sent on through the rounded layer.

In one pass each linear is rounded when its input arrives, so that o_proj sees the rounded q, k and v. In two, a
batch at a time, the layer is observed as it was, then rounded, then run again.

Shape suffixes: S samples of a batch, L tokens of a sample, E hidden size, K in_features.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from quantkit.arch import Role, place_of
from quantkit.arch.experts import EXPERTS, ExpertNames
from quantkit.calibration.experts import Coverage, Routed, round_experts
from quantkit.calibration.rounding import RoundedLinear, new_stats, round_linears
from quantkit.calibration.skeleton import Call, Skeleton, run_layer
from quantkit.formats.compressed_tensors import encode_linear
from quantkit.observers import InputStats
from quantkit.recipe import LinearPlan, QuantPlan
from quantkit.schemes.activation import fake_quantize_input

OnLinear = Callable[[LinearPlan, Mapping[str, Any]], None]
OnInput = Callable[[str, Tensor], Tensor]  # group and input -> what its linears compute with


class Streams(NamedTuple):
    """Hidden states in batches [S, L, E]: behind rounded layers, and, where weights are corrected, in the original."""

    hidden: list[Tensor]
    originals: list[Tensor] | None


class LayerWork:
    """A layer while it is rounded. Use `one_pass` or `two_passes`, then ask for what came out.

    tensors: the layer by names on disk below it. Owns the layer's module in the skeleton meanwhile.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        plan: QuantPlan,
        layer: int,
        linears: Sequence[LinearPlan],
        tensors: Mapping[str, Tensor],
        on_linear: OnLinear,
    ) -> None:
        self._skeleton = skeleton
        self._plan = plan
        self._tensors = tensors
        self._module = skeleton.fill_layer(layer, tensors)
        self._on_linear = on_linear
        self._groups: dict[str, list[LinearPlan]] = defaultdict(list)
        self._experts: dict[str, LinearPlan] = {}
        for linear in linears:
            if linear.scheme is not None and linear.role is Role.EXPERT:
                self._experts[below_layer(linear.name)] = linear
            elif linear.scheme is not None:
                self._groups[linear.group].append(linear)
        self._expert_names = EXPERTS[skeleton.checkpoint.model_type] if self._experts else None
        self._rounded: dict[str, tuple[LinearPlan, RoundedLinear]] = {}
        self._coverage: Coverage | None = None
        self._num_excluded = 0

    def one_pass(self, streams: Streams, call: Call) -> Streams:
        """Round each linear at its first use. streams: one batch with all tokens."""
        (hidden,), originals = streams
        original_inputs: dict[str, Tensor] = {}
        if originals is not None:
            originals = [self._run(originals[0], call, partial(_keep_input, original_inputs))]

        def observe_and_round(group: str, x: Tensor) -> Tensor:
            stats = self._new_stats(x, group in original_inputs)
            stats.add(self._quantized(group, x), original_inputs.pop(group, None))
            self._round(group, stats)
            return self._quantized(group, x)

        after = self._run(hidden, call, observe_and_round, lambda routed: self._round_experts([routed]))
        return Streams([after], originals)

    def two_passes(self, streams: Streams, call: Call) -> Streams:
        """Observe all batches, round, run all batches again; each takes the place of the one that went in."""
        stats: dict[str, InputStats] = {}
        routed: list[Routed] = []
        for number, batch in enumerate(streams.hidden):
            original_inputs: dict[str, Tensor] = {}
            if streams.originals is not None:
                keep = partial(_keep_input, original_inputs)
                original = streams.originals[number]
                streams.originals[number] = self._run(original, call, keep).to(original.device)

            def observe(group: str, x: Tensor, inputs: dict[str, Tensor] = original_inputs) -> Tensor:
                if group not in stats:
                    stats[group] = self._new_stats(x, group in inputs)
                stats[group].add(self._quantized(group, x), inputs.pop(group, None))
                return x

            self._run(
                batch, call, observe, lambda call: routed.append(Routed(*(part.cpu() for part in call)))
            )
        for group in self._groups:
            self._round(group, stats.pop(group))
        if self._experts:
            self._round_experts(routed)
        for number, batch in enumerate(streams.hidden):
            streams.hidden[number] = self._run(batch, call, self._quantized).to(batch.device)
        return streams

    @property
    def rounded_weights(self) -> set[str]:
        """Weights and biases that `stored_tensors` has, by names below the layer."""
        names = {f"{below_layer(name)}.weight" for name in self._rounded}
        biases = {below_layer(name) for name in self.stored_tensors() if name.endswith(".bias")}
        return names | biases

    def stored_tensors(self) -> dict[str, Tensor]:
        """The rounded linears under their final names, on the CPU; biases where they were corrected."""
        tensors: dict[str, Tensor] = {}
        for name, (linear, rounded) in self._rounded.items():
            assert linear.scheme is not None, "only quantized linears are rounded"
            for suffix, tensor in encode_linear(rounded.stored, linear.scheme).items():
                tensors[f"{name}.{suffix}"] = tensor.cpu()
            bias = self._tensors.get(f"{below_layer(name)}.bias")
            if rounded.bias_N is not None and bias is not None:
                corrected = bias.float() + rounded.bias_N.to(bias.device)
                tensors[f"{name}.bias"] = corrected.to(self._plan.scale_dtype).cpu()
        return tensors

    def notes(self) -> dict[str, Any]:
        """What quantkit.json says of the layer."""
        notes: dict[str, Any] = {
            "linears": {name: rounded.note for name, (_, rounded) in self._rounded.items()},
            "excluded": self._num_excluded,
        }
        if self._coverage is not None:
            notes["experts"] = {"tokens": self._coverage.num_tokens, "starved": self._coverage.starved}
        return notes

    def _run(
        self,
        hidden: Tensor,
        call: Call,
        on_input: OnInput,
        on_experts: Callable[[Routed], None] = lambda routed: None,
    ) -> Tensor:
        with self._inputs(on_input), self._routed(on_experts):
            return run_layer(self._module, hidden.to(self._skeleton.device), call)

    @contextmanager
    def _inputs(self, on_input: OnInput) -> Iterator[None]:
        """While open, the first linear of a group that is called tells of their common input."""
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def look(group: str, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            if group not in seen:
                seen[group] = args[0], on_input(group, args[0])
            given, used = seen[group]
            assert given is args[0], f"the linears of {group} read one input"
            return (used,)

        handles = [
            self._linear(linear).register_forward_pre_hook(lambda _, args, group=group: look(group, args))
            for group, linears in self._groups.items()
            for linear in linears
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _routed(self, on_experts: Callable[[Routed], None]) -> Iterator[None]:
        """While open, the module of experts tells what it is called with."""
        if self._expert_names is None:
            yield
            return
        module = self._module.get_submodule(self._expert_names.module)
        handle = module.register_forward_pre_hook(lambda _, args: on_experts(Routed(*args[:2])))
        try:
            yield
        finally:
            handle.remove()

    def _linear(self, linear: LinearPlan) -> nn.Module:
        return self._module.get_submodule(self._skeleton.module_name(below_layer(linear.name)))

    def _quantized(self, group: str, x: Tensor) -> Tensor:
        """The input as the quantized linears get it; until its static scale is chosen, as it is."""
        linear = self._groups[group][0]
        assert linear.scheme is not None, "groups are of quantized linears"
        if linear.scheme.activation is None:
            return x
        static = None
        if linear.scheme.is_static:
            if linear.name not in self._rounded:
                return x
            static = self._rounded[linear.name][1].stored.input_qparams
        flat = x.reshape(-1, x.shape[-1])
        return fake_quantize_input(flat, linear.scheme.activation, static).reshape(x.shape)

    def _new_stats(self, x: Tensor, has_original: bool) -> InputStats:
        return new_stats(self._plan, x.shape[-1], x.device, has_original=has_original)

    def _round(self, group: str, stats: InputStats) -> None:
        linears = self._groups[group]
        weights = {linear.name: self._weight(linear) for linear in linears}
        rounded = round_linears(self._plan, linears, weights, stats)
        self._num_excluded += stats.num_excluded
        for linear in linears:
            module, result = self._linear(linear), rounded[linear.name]
            module.get_parameter("weight").data = result.weight_NK.to(self._skeleton.dtype)
            result = self._with_bias(module, result)
            self._keep(linear, result)

    def _with_bias(self, module: nn.Module, result: RoundedLinear) -> RoundedLinear:
        if result.bias_N is None:
            return result
        if "bias" not in dict(module.named_parameters()):
            return result._replace(bias_N=None, note=result.note | {"bias": "none to correct"})
        bias = module.get_parameter("bias")
        bias.data = bias.data + result.bias_N.to(bias.dtype)
        return result

    def _round_experts(self, routed: Sequence[Routed]) -> None:
        assert self._expert_names is not None, "asked for where there are experts"
        names: ExpertNames = self._expert_names

        def round_some(weights: Mapping[str, Tensor], stats: InputStats) -> dict[str, Tensor]:
            linears = [self._experts[name] for name in weights if name in self._experts]
            exact = {linear.name: self._weight(linear) for linear in linears}
            rounded = round_linears(self._plan, linears, exact, stats)
            self._num_excluded += stats.num_excluded
            for linear in linears:
                self._keep(linear, rounded[linear.name])
            return dict(weights) | {
                below_layer(name): result.weight_NK.to(self._skeleton.dtype)
                for name, result in rounded.items()
            }

        self._coverage = round_experts(
            self._module.get_submodule(names.module),
            names,
            routed,
            new_stats=lambda features: new_stats(
                self._plan, features, self._skeleton.device, has_original=False
            ),
            round_linears=round_some,
        )

    def _weight(self, linear: LinearPlan) -> Tensor:
        """The weight before rounding, float32, on the device."""
        return self._tensors[f"{below_layer(linear.name)}.weight"].to(self._skeleton.device).float()

    def _keep(self, linear: LinearPlan, result: RoundedLinear) -> None:
        algorithm = "gptq" if "gptq" in self._plan.recipe.algorithms else "rtn"
        note = {"algorithm": algorithm if "fallback" not in result.note else "rtn"} | result.note
        self._rounded[linear.name] = (
            linear,
            result._replace(note=note, weight_NK=result.weight_NK.new_empty(0)),
        )
        self._on_linear(linear, note)


def _keep_input(inputs: dict[str, Tensor], group: str, x: Tensor) -> Tensor:
    inputs[group] = x
    return x


def below_layer(name: str) -> str:
    """A full name without the prefix of its layer."""
    place = place_of(name)
    assert place is not None, "linears are in layers"
    return name.removeprefix(place.prefix)
