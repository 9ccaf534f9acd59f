"""Who can load a quantized checkpoint, and why not: facts about other people's loaders, with their evidence.

Each fact says how it was found: by loading such a checkpoint, or by reading the loader's source. What neither
settled is `unknown`. The versions are those that were looked at; newer ones may do more.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from quantkit.schemes import FloatSpec, IntSpec, KVScheme, PerBlock, PerGroup, PerTensor, Scheme
from quantkit.schemes.labels import kv_plan_label, scheme_label

LOADED = "checked by loading with transformers 5.23.0"
READ_TRANSFORMERS = "read in the sources of transformers 5.23.0"
READ_VLLM = "read in the sources of vLLM 0.33.0"
READ_OTHER_VLLM = "read in the sources of another version of vLLM"
READ_SGLANG = "read in the sources of SGLang 0.5.23"
UNCONFIRMED = "not confirmed"

Answer = Literal["yes", "no", "unknown"]


class Reason(NamedTuple):
    """One fact that bears on loading: what it answers, in words, and how it is known."""

    answer: Answer
    text: str
    evidence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderVerdict:
    """Whether one loader takes the checkpoint: `no` if anything stops it, `unknown` if anything is open."""

    loader: str
    loads: Answer
    reasons: tuple[Reason, ...]


class LinearFacts(NamedTuple):
    """What loaders look at in one linear. group: what runs as one matmul. shape: [N, K]."""

    name: str
    group: str
    scheme: Scheme | None
    shape: tuple[int, int]
    is_expert: bool


def loader_verdicts(
    linears: Sequence[LinearFacts],
    kv: KVScheme | None,
    *,
    kept_layers: Sequence[int] = (),
    unmatched: Sequence[str] = (),
) -> list[LoaderVerdict]:
    """Verdicts of transformers, vLLM and SGLang.

    kept_layers: those whose KV cache stays in 16 bits. unmatched: linears that the quantization_config neither
    targets nor ignores.
    """
    cache = None if kv is None else _Cache(kv, tuple(kept_layers))
    return [
        _verdict("transformers", *_transformers(linears, cache)),
        _verdict("vLLM", *_vllm(linears, cache), *_serving(linears, unmatched, READ_VLLM, READ_OTHER_VLLM)),
        _verdict("SGLang", *_sglang(linears, cache), *_serving(linears, unmatched, READ_SGLANG, READ_SGLANG)),
    ]


def _verdict(loader: str, *reasons: Reason) -> LoaderVerdict:
    answers = {reason.answer for reason in reasons}
    loads: Answer = "no" if "no" in answers else "unknown" if "unknown" in answers else "yes"
    return LoaderVerdict(loader=loader, loads=loads, reasons=reasons)


class _Cache(NamedTuple):
    """The KV cache; kept_layers: in 16 bits."""

    scheme: KVScheme
    kept_layers: tuple[int, ...]

    def __str__(self) -> str:
        return f"KV cache {kv_plan_label(self.scheme, self.kept_layers)}"

    @property
    def is_in_config(self) -> bool:
        """Whether config.json says it."""
        return self.scheme.dtype == "fp8" and not self.kept_layers


class _Kind(NamedTuple):
    """The linears of one scheme, dense ones and experts apart."""

    scheme: Scheme
    is_expert: bool
    linears: list[LinearFacts]

    def __str__(self) -> str:
        return scheme_label(self.scheme) + (" experts" if self.is_expert else "")

    def not_divisible(self, *, rows: int = 1, cols: int = 1) -> LinearFacts | None:
        """The first linear whose shape is not a multiple of these."""
        return next((one for one in self.linears if one.shape[0] % rows or one.shape[1] % cols), None)


def _kinds(linears: Sequence[LinearFacts]) -> list[_Kind]:
    members: dict[tuple[Scheme, bool], list[LinearFacts]] = defaultdict(list)
    for linear in linears:
        if linear.scheme is not None:
            members[linear.scheme, linear.is_expert].append(linear)
    return [_Kind(scheme, is_expert, found) for (scheme, is_expert), found in members.items()]


def _transformers(linears: Sequence[LinearFacts], cache: _Cache | None) -> Iterator[Reason]:
    kinds = _kinds(linears)
    for kind in kinds:
        yield _transformers_scheme(kind)
        if kind.is_expert and kind.scheme.activation is not None:
            yield Reason("yes", f"{kind}: their inputs stay in 16 bits", LOADED)
    if any(linear.is_expert and linear.scheme is None for linear in linears):
        yield _transformers_exact_experts(kinds)
    elif not kinds:
        yield Reason("yes", "no linear is quantized", LOADED)
    if len({kind.scheme for kind in kinds}) > 1:
        yield Reason(
            "yes",
            "several schemes: only the default load; with dequantize=True it uses one scheme for all of them and "
            "gets wrong weights",
            LOADED,
        )
    if cache is not None and cache.is_in_config:
        yield Reason("yes", f"{cache}: emulated", LOADED)
    elif cache is not None:
        yield Reason("yes", f"{cache}: not read; the cache stays in 16 bits", READ_TRANSFORMERS)


def _transformers_exact_experts(kinds: Sequence[_Kind]) -> Reason:
    """Experts in 16 bits: it decodes all experts there are, with the first scheme that it finds."""
    if not kinds:
        return Reason(
            "no", "no linear is quantized: it looks for the scheme of experts; fails to load", LOADED
        )
    if isinstance(kinds[0].scheme.weight, FloatSpec):
        return Reason("yes", "experts in 16 bits: loads them as they are", LOADED)
    return Reason("no", f"experts in 16 bits: it unpacks them as {kinds[0]}; fails to load", LOADED)


def _transformers_scheme(kind: _Kind) -> Reason:
    weight = kind.scheme.weight
    if kind.is_expert and isinstance(kind.scheme.activation, IntSpec):
        return Reason(
            "no", f"{kind}: it unpacks experts, and these codes are not packed; fails to load", LOADED
        )
    if kind.is_expert and isinstance(weight.granularity, PerBlock):
        return Reason("no", f"{kind}: it has no block scales for experts; fails to load", LOADED)
    if not weight.symmetric:
        return Reason(
            "no",
            f"{kind}: zero points fail with a shape mismatch; "
            "CompressedTensorsConfig(dequantize=True) loads them if this is the only scheme",
            LOADED,
        )
    if isinstance(weight.granularity, PerBlock):
        odd = kind.not_divisible(cols=weight.granularity.cols)
        if odd:
            return Reason(
                "no", f"{odd.name}: in_features {odd.shape[1]} are not whole blocks; fails to run", LOADED
            )
    return Reason("yes", f"{kind}: loads, and computes on dequantized weights", LOADED)


def _vllm(linears: Sequence[LinearFacts], cache: _Cache | None) -> Iterator[Reason]:
    for kind in _kinds(linears):
        answer, text = _vllm_scheme(kind)
        yield Reason(answer, text, UNCONFIRMED if answer == "unknown" else READ_VLLM)
    if cache is not None and cache.is_in_config:
        yield Reason("yes", f"{cache}: switched on by --kv-cache-dtype auto", READ_VLLM)
    elif cache is not None:
        flags = {
            "fp8": "--kv-cache-dtype fp8_e4m3",
            "int8": "--kv-cache-dtype int8_per_token_head (one dynamic scale per token and head)",
        }[cache.scheme.dtype]
        if cache.kept_layers:
            flags += f" --kv-cache-dtype-skip-layers {' '.join(map(str, cache.kept_layers))}"
        text = f"{cache}: its config cannot say it, so the cache stays in 16 bits; closest is {flags}"
        yield Reason("yes", text, READ_OTHER_VLLM)


def _vllm_scheme(kind: _Kind) -> tuple[Answer, str]:
    weight, activation = kind.scheme.weight, kind.scheme.activation
    if isinstance(weight, IntSpec) and activation is None:
        return _vllm_weight_only(kind, weight)
    if kind.is_expert:
        return "unknown", f"{kind}: only weight-only INT experts were looked at"
    if isinstance(weight, FloatSpec):
        odd = kind.not_divisible(cols=128) if isinstance(weight.granularity, PerBlock) else None
        if odd:
            return "unknown", f"{odd.name}: in_features {odd.shape[1]} are not whole blocks"
        return (
            "yes",
            f"{kind}: takes it" if activation is None else f"{kind}: from SM89, below it with 16-bit inputs",
        )
    if weight.bits == 8:
        return "yes", f"{kind}: takes it"
    if isinstance(activation, IntSpec):
        return "unknown", f"{kind}: it has a class for it, but no CUDA kernel for it was found"
    if weight.granularity == PerGroup(128):
        return "yes", f"{kind}: on SM90 only"
    return "no", f"{kind}: it takes INT4 weights with FP8 inputs in groups of 128 only"


def _vllm_weight_only(kind: _Kind, weight: IntSpec) -> tuple[Answer, str]:
    if kind.is_expert and (not weight.symmetric or weight.bits == 2):
        return "unknown", f"{kind}: only symmetric experts of 4 and 8 bits were looked at"
    odd = kind.not_divisible(rows=64, cols=128)
    if odd:
        return (
            "unknown",
            f"{odd.name}: whether a kernel takes its shape {list(odd.shape)}, not in multiples of [64, 128]",
        )
    return "yes", f"{kind}: from SM75"


def _sglang(linears: Sequence[LinearFacts], cache: _Cache | None) -> Iterator[Reason]:
    for kind in _kinds(linears):
        yield Reason(*(_sglang_experts(kind) if kind.is_expert else _sglang_scheme(kind)), READ_SGLANG)
    if cache is None:
        return
    if cache == _Cache(KVScheme(dtype="fp8", granularity="tensor"), ()):
        yield Reason("yes", f"{cache}: switched on by --kv-cache-dtype auto", READ_SGLANG)
        return
    text = "stays in 16 bits; closest is --kv-cache-dtype fp8_e4m3, without the stored scales"
    why = (
        "takes one scale per tensor only, so the cache"
        if cache.is_in_config
        else "its config cannot say it, so the cache"
    )
    yield Reason("yes", f"{cache}: {why} {text}", READ_SGLANG)


def _sglang_scheme(kind: _Kind) -> tuple[Answer, str]:
    weight, activation = kind.scheme.weight, kind.scheme.activation
    if isinstance(weight, FloatSpec):
        if isinstance(weight.granularity, PerBlock):
            odd = kind.not_divisible(rows=128, cols=128)
            if odd:
                return "unknown", f"{odd.name}: shape {list(odd.shape)} is not in whole blocks"
        if activation is None:
            return "yes", f"{kind}: from SM80"
        return "yes", f"{kind}: from SM89, below it with 16-bit inputs"
    if activation is None:
        return _sglang_weight_only(kind, weight)
    if weight.bits == 4:
        return "no", f"{kind}: only experts can have INT4 weights with quantized inputs"
    if kind.scheme.is_static:
        return "unknown", f"{kind}: it quantizes inputs per token, whatever input scale is stored"
    return "yes", f"{kind}: from SM80"


def _sglang_weight_only(kind: _Kind, weight: IntSpec) -> tuple[Answer, str]:
    if weight.bits == 2:
        return "no", f"{kind}: it takes 4 and 8 bits only"
    odd = kind.not_divisible(rows=64, cols=128)
    if odd:
        return (
            "unknown",
            f"{odd.name}: its Marlin kernel asks for shapes in multiples of [64, 128], not {list(odd.shape)}",
        )
    return "yes", f"{kind}: from SM80"


def _sglang_experts(kind: _Kind) -> tuple[Answer, str]:
    weight, activation = kind.scheme.weight, kind.scheme.activation
    if isinstance(weight, FloatSpec):
        return ("no", f"{kind}: it needs FP8 inputs") if activation is None else ("yes", f"{kind}: from SM80")
    if activation is None:
        is_plain = weight.bits != 2 and weight.symmetric
        return ("yes", f"{kind}: from SM80") if is_plain else ("unknown", f"{kind}: not settled")
    if isinstance(activation, FloatSpec):
        return "yes", f"{kind}: from SM90"
    return "no", f"{kind}: on NPUs only"


def _serving(
    linears: Sequence[LinearFacts], unmatched: Sequence[str], fusing: str, other: str
) -> Iterator[Reason]:
    """What vLLM and SGLang have in common: they fuse linears, and look each one up in the config.

    fusing, other: the evidence for the first and for the rest.
    """
    if not any(linear.scheme for linear in linears):
        yield Reason("yes", "no linear is quantized", other)
        return
    groups: dict[str, set[Scheme | None]] = defaultdict(set)
    for linear in linears:
        groups[linear.group].add(linear.scheme)
    for group, schemes in groups.items():
        if len(schemes) > 1:
            labels = sorted("16 bits" if scheme is None else scheme_label(scheme) for scheme in schemes)
            yield Reason("no", f"{group} is one matmul but has {' and '.join(labels)}", fusing)
    if unmatched:
        yield Reason(
            "no", f"{len(unmatched)} linears neither targeted nor ignored, first {unmatched[0]}", other
        )
    fused = next((one for one in linears if one.group != one.name and _is_fp8_with_one_scale(one)), None)
    if fused:
        text = (
            f"{fused.group}: fused linears with one scale each are requantized to the largest of their scales"
        )
        yield Reason("yes", text, other)


def _is_fp8_with_one_scale(linear: LinearFacts) -> bool:
    if linear.scheme is None or linear.scheme.activation is None or linear.is_expert:
        return False
    weight = linear.scheme.weight
    return isinstance(weight, FloatSpec) and isinstance(weight.granularity, PerTensor)
