"""Specs and schemes <-> the `args` and group objects of a compressed-tensors quantization_config.

The package forbids keys it does not know, and so does this; what it knows and we do not implement is refused
by name, never dropped.
"""

from collections.abc import Mapping
from typing import Any

from quantkit.errors import SchemeError, SourceError
from quantkit.formats.compressed_tensors import format_name
from quantkit.schemes import (
    FloatSpec,
    Granularity,
    IntSpec,
    KVScheme,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    Scheme,
    Spec,
)
from quantkit.schemes.support import check_scheme

# How a checkpoint was calibrated and in which dtype numbers were stored says nothing about how to read it.
_HISTORY_KEYS = {"observer", "observer_kwargs", "scale_dtype", "zp_dtype"}
_ARGS_KEYS = {
    "num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder",
} | _HISTORY_KEYS  # fmt: skip
_GROUP_KEYS = {"targets", "weights", "input_activations", "output_activations", "format"}


def group_json(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    """One entry of `config_groups`."""
    weight, activation = scheme.weight, scheme.activation
    return {
        "targets": targets,
        "weights": _args(weight, dynamic=False),
        "input_activations": None if activation is None else _args(activation, dynamic=not scheme.is_static),
        "output_activations": None,
        "format": format_name(scheme),
    }


def kv_json(kv: KVScheme) -> dict[str, Any] | None:
    """`kv_cache_scheme`; None for INT8, which is described outside config.json."""
    if kv.dtype != "fp8":
        return None
    strategy = {"tensor": "tensor", "head": "attn_head"}[kv.granularity]
    return {**_args(FloatSpec(granularity=PerTensor()), dynamic=False), "strategy": strategy}


def parse_group(name: str, group: Any, model_format: Any) -> tuple[tuple[str, ...], Scheme]:
    """Targets and scheme of one entry of `config_groups`.

    Raises SourceError for keys, formats and combinations that are unknown or that nothing can run.
    """
    if not isinstance(group, Mapping):
        raise unsupported(f"{name}: {group!r}, a scheme by name or no scheme at all")
    _check_keys(group, _GROUP_KEYS, name)
    targets = group.get("targets")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise unsupported(f"targets {targets!r} in {name}")
    if group.get("output_activations") is not None:
        raise unsupported(f"output_activations in {name}")
    if group.get("weights") is None:
        raise unsupported(f"quantized attention activations in {name}")
    inputs = group.get("input_activations")
    scheme = Scheme(
        weight=_weight_spec(group["weights"], f"{name}.weights"),
        activation=None if inputs is None else _activation_spec(inputs, f"{name}.input_activations"),
    )
    try:
        check_scheme(scheme)
    except SchemeError as error:
        raise unsupported(f"in {name} {error.problem}") from None
    stored = group.get("format") or model_format
    if stored != format_name(scheme):
        raise unsupported(f"format {stored!r} in {name} (for this scheme only {format_name(scheme)!r} is)")
    return tuple(targets), scheme


def parse_kv(args: Any) -> KVScheme:
    """The scheme of a `kv_cache_scheme`. Raises SourceError for all but static symmetric FP8."""
    _check_args(args, "kv_cache_scheme")
    strategy = args.get("strategy") or "tensor"
    kind = (
        args.get("type"),
        args.get("num_bits", 8),
        args.get("symmetric", True),
        args.get("dynamic", False),
    )
    if kind != ("float", 8, True, False) or strategy not in ("tensor", "attn_head"):
        raise unsupported(f"kv_cache_scheme {dict(args)!r}")
    return KVScheme(dtype="fp8", granularity="tensor" if strategy == "tensor" else "head")


def unsupported(finding: str) -> SourceError:
    """What to raise for a quantization_config that holds `finding`."""
    return SourceError(
        f"config.json: quantization_config has {finding}, which is not supported",
        fix="use a checkpoint that quantkit wrote, or compressed-tensors with INT or FP8 weights",
    )


def _args(spec: Spec, *, dynamic: bool) -> dict[str, Any]:
    args: dict[str, Any] = {
        "num_bits": spec.bits,
        "type": "int" if isinstance(spec, IntSpec) else "float",
        "symmetric": spec.symmetric,
        "group_size": None,
        "dynamic": dynamic,
    }
    match spec.granularity:
        case PerTensor():
            args["strategy"] = "tensor"
        case PerChannel():
            args["strategy"] = "channel"
        case PerToken():
            args["strategy"] = "token"
        case PerGroup(size):
            args |= {"strategy": "group", "group_size": size}
        case PerBlock(rows, cols):
            args |= {"strategy": "block", "block_structure": [rows, cols]}
    return args


def _weight_spec(args: Any, place: str) -> Spec:
    spec = _spec(args, place)
    if args.get("dynamic", False) is not False:
        raise unsupported(f"dynamic {args['dynamic']!r} in {place}")
    return spec


def _activation_spec(args: Any, place: str) -> Spec:
    spec = _spec(args, place)
    dynamic = args.get("dynamic", False)
    if type(dynamic) is not bool or dynamic == isinstance(spec.granularity, PerTensor):
        raise unsupported(f"strategy {args.get('strategy')!r} with dynamic {dynamic!r} in {place}")
    return spec


def _spec(args: Any, place: str) -> Spec:
    _check_args(args, place)
    granularity = _granularity(args, place)
    symmetric, bits, kind = args.get("symmetric", True), args.get("num_bits", 8), args.get("type", "int")
    if type(symmetric) is not bool or type(bits) is not int or kind not in ("int", "float"):
        raise unsupported(f"type {kind!r} with num_bits {bits!r} and symmetric {symmetric!r} in {place}")
    if args.get("actorder") not in (None, False, "weight", "static"):
        raise unsupported(f"actorder {args['actorder']!r} in {place}")
    if kind == "int":
        return IntSpec(bits=bits, granularity=granularity, symmetric=symmetric)
    if bits != 8:
        raise unsupported(f"floating-point numbers of {bits} bits (NVFP4 and MX formats) in {place}")
    if not symmetric:
        raise unsupported(f"asymmetric FP8 in {place}")
    return FloatSpec(granularity=granularity)


def _granularity(args: Mapping[str, Any], place: str) -> Granularity:
    size, block = args.get("group_size"), args.get("block_structure")
    match args.get("strategy"):
        case "tensor":
            return PerTensor()
        case "channel":
            return PerChannel()
        case "token":
            return PerToken()
        case "group" if type(size) is int and size > 0:
            return PerGroup(size)
        case "block" if isinstance(block, list) and [type(extent) for extent in block] == [int, int]:
            return PerBlock(block[0], block[1])
    raise unsupported(f"strategy {args.get('strategy')!r} with group_size {size!r} in {place}")


def _check_args(args: Any, place: str) -> None:
    if not isinstance(args, Mapping):
        raise unsupported(f"{place} {args!r}")
    _check_keys(args, _ARGS_KEYS, place)


def _check_keys(section: Mapping[str, Any], known: set[str], place: str) -> None:
    unknown = sorted(section.keys() - known)
    if unknown:
        raise unsupported(f"the key {unknown[0]!r} in {place}")
