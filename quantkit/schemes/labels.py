"""Schemes in words, for tables, cards and quantkit.json."""

from collections.abc import Collection

from quantkit.schemes.specs import (
    FloatSpec,
    Granularity,
    KVScheme,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    Scheme,
    Spec,
)


def scheme_label(scheme: Scheme) -> str:
    """For example "INT4 group 64", "FP8 channel, inputs FP8 token"."""
    if scheme.activation is None:
        return _spec_label(scheme.weight)
    return f"{_spec_label(scheme.weight)}, inputs {_spec_label(scheme.activation)}"


def kv_label(kv: KVScheme) -> str:
    """For example "INT8 token"."""
    return f"{kv.dtype.upper()} {kv.granularity}"


def _spec_label(spec: Spec) -> str:
    kind = "FP8" if isinstance(spec, FloatSpec) else f"INT{spec.bits}"
    return f"{kind} {_granularity_label(spec.granularity)}" + ("" if spec.symmetric else " asymmetric")


def _granularity_label(granularity: Granularity) -> str:
    match granularity:
        case PerTensor():
            return "tensor"
        case PerChannel():
            return "channel"
        case PerGroup(size):
            return f"group {size}"
        case PerBlock(rows, cols):
            return f"block {rows}x{cols}"
        case _:
            return "token"


def kv_plan_label(kv: KVScheme, kept_layers: Collection[int]) -> str:
    """A KV cache in words, some of whose layers may stay in 16 bits."""
    if not kept_layers:
        return kv_label(kv)
    noun = "layer" if len(kept_layers) == 1 else "layers"
    return f"{kv_label(kv)}, 16 bits in {noun} {', '.join(map(str, sorted(kept_layers)))}"
