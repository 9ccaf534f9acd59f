"""The KV cache of one layer: the scales that cost attention least, what each format costs, and whether it may.

Measured on some of the calibration samples, by running the layer's attention alone with its keys and values taken
through the cache. A layer's keys and values are calibrated when its linears are rounded, so they are those that
will be served.

Shape suffixes: S samples, L tokens, E hidden size, H KV heads, C candidates.
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from quantkit.algorithms.kv_scales import choose_scales, scale_candidates
from quantkit.calibration.skeleton import Call, run_layer
from quantkit.errors import CalibrationError
from quantkit.numerics.kv_codes import KVDtype
from quantkit.observers.kv import CacheReached, KVStats, RoundTripCache, WatchedCache
from quantkit.schemes import KVScheme

PROBE_SAMPLES = 4
# Squared error of the attention's output over its square, above which a layer's cache stays in 16 bits: about what
# INT4 weights do to an output (17 dB), so that a cache is cheap beside any weights it comes with. For comparison:
# 0.001 to 0.006 with FP8 and 0.00002 to 0.0035 with INT8 in the layers of SmolLM2-135M.
MAX_COST = 0.02
DTYPES: tuple[KVDtype, ...] = ("fp8", "int8")
# In every family of `arch.FAMILIES`: the attention, and the linear that reads what the heads compute.
ATTENTION, ATTENTION_OUTPUT = "self_attn", "self_attn.o_proj"

Scales = tuple[Tensor, Tensor]


class LayerKV(NamedTuple):
    """How a layer's keys and values are stored.

    scales: of keys and values, float32 [1] or [H, 1, 1] on the CPU, rounded to the dtype they are stored in. stays:
    why the cache of this layer stays in 16 bits, or None. costs: squared error of the attention's output over its
    square, by format.
    """

    dtype: KVDtype
    scales: Scales
    stays: str | None
    costs: dict[KVDtype, float]

    @property
    def note(self) -> dict[str, Any]:
        """What quantkit.json says of it."""
        k_scale, v_scale = (scale.flatten().tolist() for scale in self.scales)
        stored = {"stored": "16 bits", "reason": self.stays} if self.stays else {"stored": self.dtype}
        costs = {dtype: float(f"{cost:.3g}") for dtype, cost in self.costs.items()}
        return {**stored, "costs": costs, "k_scale": k_scale, "v_scale": v_scale}

    @classmethod
    def from_note(cls, note: Mapping[str, Any], scheme: KVScheme) -> "LayerKV":
        """What was noted of a layer."""
        shape = (1,) if scheme.granularity == "tensor" else (-1, 1, 1)
        k_scale, v_scale = (torch.tensor(note[name]).view(shape) for name in ("k_scale", "v_scale"))
        return cls(scheme.dtype, (k_scale, v_scale), note.get("reason"), note["costs"])


def watch_cache(layer: nn.Module, hidden_SLE: Tensor, call: Call, stats: KVStats) -> None:
    """Tell statistics of the keys and values of a batch; what comes after them in the layer is not computed."""
    with contextlib.suppress(CacheReached):
        run_layer(layer, hidden_SLE, _with_cache(call, WatchedCache(stats)))


def through_cache(call: Call, kv: LayerKV) -> Call:
    """The layer's call, attending to keys and values as they come back from their cache."""
    if kv.stays:
        return call
    return _with_cache(call, RoundTripCache(kv.dtype, *kv.scales))


def probe_samples(hidden: list[Tensor]) -> Tensor:
    """Hidden states of some samples, spread evenly over all batches, [S, L, E]."""
    ends = torch.tensor([len(part) for part in hidden]).cumsum(0).tolist()
    count = min(PROBE_SAMPLES, ends[-1])
    wanted = [index * ends[-1] // count for index in range(count)]
    batches = [next(number for number, end in enumerate(ends) if index < end) for index in wanted]
    rows = [hidden[batch][index - ends[batch]] for batch, index in zip(batches, wanted, strict=True)]
    return torch.stack(rows)


@torch.no_grad()
def choose_kv(
    layer: nn.Module,
    probe_SLE: Tensor,
    call: Call,
    stats: KVStats,
    scheme: KVScheme,
    scale_dtype: torch.dtype,
) -> LayerKV:
    """Scales for the scheme, and what each format costs this layer.

    layer: with its weights as they will be served. probe_SLE: the layer's input. stats: of all calibration tokens.
    Raises CalibrationError where no sample is finite.
    """
    probe = AttentionProbe(layer, probe_SLE, call, num_heads=stats.num_heads)
    scales = {dtype: _usual_scales(dtype, stats, scale_dtype) for dtype in DTYPES}
    scales[scheme.dtype] = _best_scales(probe, stats, scheme, scale_dtype)
    costs = {dtype: probe.cost(RoundTripCache(dtype, *scales[dtype])) for dtype in DTYPES}
    cost = costs[scheme.dtype]
    stays = None
    if cost > MAX_COST:
        stays = f"{scheme.dtype} costs {cost:.2g} of the attention's output, more than {MAX_COST}"
    k_scale, v_scale = scales[scheme.dtype]
    return LayerKV(scheme.dtype, (k_scale.cpu(), v_scale.cpu()), stays, costs)


def _usual_scales(dtype: KVDtype, stats: KVStats, scale_dtype: torch.dtype) -> Scales:
    """What a format is used with where nothing is searched for: 1.0 for FP8, amax of each head for INT8."""
    first_H = [scale_candidates(absmax_H, dtype, scale_dtype, per_head=True)[0] for absmax_H in stats.absmax]
    return first_H[0].view(-1, 1, 1), first_H[1].view(-1, 1, 1)


def _best_scales(
    probe: "AttentionProbe", stats: KVStats, scheme: KVScheme, scale_dtype: torch.dtype
) -> Scales:
    """The best candidates of keys, with exact values, and of values, with exact keys."""
    dtype, per_head = scheme.dtype, scheme.granularity == "head"

    def best(absmax_H: Tensor, cache: Callable[[Tensor], RoundTripCache]) -> Tensor:
        candidates_CH = scale_candidates(absmax_H, dtype, scale_dtype, per_head=per_head)
        errors = [probe.head_errors(cache(scale_H.view(-1, 1, 1))) for scale_H in candidates_CH]
        return choose_scales(candidates_CH, torch.stack(errors), per_head=per_head)

    k_absmax_H, v_absmax_H = stats.absmax
    k_scale = best(k_absmax_H, lambda scale: RoundTripCache(dtype, scale, None))
    v_scale = best(v_absmax_H, lambda scale: RoundTripCache(dtype, None, scale))
    return k_scale, v_scale


class AttentionProbe:
    """The attention of one layer on fixed samples, run with one cache or another."""

    def __init__(self, layer: nn.Module, probe_SLE: Tensor, call: Call, *, num_heads: int) -> None:
        self._attention = layer.get_submodule(ATTENTION)
        self._output = layer.get_submodule(ATTENTION_OUTPUT)
        self._num_heads = num_heads
        self._call = _caught_call(self._attention, lambda: run_layer(layer, probe_SLE, call))
        exact = self._run(None)
        self._is_finite_S = exact.output.isfinite().flatten(1).all(dim=1)
        if not bool(self._is_finite_S.any()):
            raise CalibrationError(
                "no calibration sample gives this layer's attention a finite output",
                fix="look at the model's weights: its activations overflow; or leave the KV cache in 16 bits",
            )
        self._exact = _Computed(*(part[self._is_finite_S] for part in exact))

    def head_errors(self, cache: RoundTripCache) -> Tensor:
        """Squared error of what the query heads of each KV head compute, by sample, [S, H]."""
        change_SLK = self._run(cache).mixed[self._is_finite_S].float() - self._exact.mixed.float()
        by_head = change_SLK.view(*change_SLK.shape[:2], self._num_heads, -1)
        return by_head.square().sum(dim=(1, 3))

    def cost(self, cache: RoundTripCache) -> float:
        """Squared error of the attention's output over its square, over all samples."""
        exact = self._exact.output.float()
        change = self._run(cache).output[self._is_finite_S].float() - exact
        return (change.square().sum() / exact.square().sum()).item()

    def _run(self, cache: RoundTripCache | None) -> "_Computed":
        mixed: list[Tensor] = []
        handle = self._output.register_forward_pre_hook(lambda _, args: mixed.append(args[0]))
        call = _with_cache(self._call, cache)
        try:
            output = self._attention(*call.args, **call.kwargs)[0]
        finally:
            handle.remove()
        return _Computed(mixed[0], output)


class _Computed(NamedTuple):
    """mixed: what the heads compute, side by side; output: what leaves the attention."""

    mixed: Tensor
    output: Tensor


def _caught_call(module: nn.Module, run: Callable[[], object]) -> Call:
    """How `run` calls the module."""
    caught: list[Call] = []

    def catch(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        caught.append(Call(args, dict(kwargs)))

    handle = module.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        run()
    finally:
        handle.remove()
    return caught[0]


def _with_cache(call: Call, cache: object) -> Call:
    return Call(call.args, {**call.kwargs, "past_key_values": cache})
