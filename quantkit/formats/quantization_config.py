"""config.json → `quantization_config`: schemes <-> the JSON that compressed-tensors defines.

Which modules are quantized how, by name; not what their tensors look like (`compressed_tensors`).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantkit.errors import SourceError
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

PACKAGE_VERSION = "0.20.0"  # whose layout this is; readers of other versions see it in the file


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedModules:
    """A parsed quantization_config; of an unquantized model it is empty.

    groups: (targets, scheme) in the order of the file. kv: the FP8 cache that the config names, or None.
    """

    groups: tuple[tuple[tuple[str, ...], Scheme], ...] = ()
    ignore: tuple[str, ...] = ()
    kv: KVScheme | None = None

    def scheme_of(self, module: str) -> Scheme | None:
        """The scheme of a linear by its full name, None if it stays 16-bit.

        As compressed-tensors matches: `ignore` beats targets; an exact name, then `re:` patterns (anchored
        at the start), then the class name `Linear`.
        """
        if any(_matches(module, target) for target in self.ignore):
            return None
        for kind in (_is_name, _is_pattern, _is_class):
            for targets, scheme in self.groups:
                if any(kind(target) and _matches(module, target) for target in targets):
                    return scheme
        return None


def write_quantization(
    schemes: Mapping[str, Scheme | None], kv: KVScheme | None, *, extra_ignore: Sequence[str] = ()
) -> dict[str, Any]:
    """The quantization_config for linears by name (None: stays 16-bit).

    One scheme for all targets the class `Linear`, with every other linear named under `ignore`; several are
    told apart by naming their modules. extra_ignore: further modules that a loader may take for linears.
    """
    used = list(dict.fromkeys(scheme for scheme in schemes.values() if scheme is not None))
    formats = [format_name(scheme) for scheme in used]
    groups = {}
    for number, (scheme, name) in enumerate(zip(used, formats, strict=True)):
        targets = (
            ["Linear"] if len(used) == 1 else [module for module in schemes if schemes[module] == scheme]
        )
        groups[f"group_{number}"] = {
            "targets": targets,
            "weights": _weight_args(scheme.weight),
            "input_activations": None if scheme.activation is None else _activation_args(scheme.activation),
            "output_activations": None,
            "format": name,
        }
    model_format = "dense" if not used else formats[0] if len(set(formats)) == 1 else "mixed-precision"
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",  # without it transformers takes the codes for weights
        "format": model_format,
        "config_groups": groups,
        "ignore": [*(module for module, scheme in schemes.items() if scheme is None), *extra_ignore],
        "kv_cache_scheme": None if kv is None or kv.dtype != "fp8" else _kv_args(kv),
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
        "version": PACKAGE_VERSION,
    }


def read_quantization(config: Mapping[str, Any]) -> QuantizedModules:
    """Parse the quantization_config of a config.json; an unquantized model gives an empty one.

    Raises SourceError for another quant_method, and for formats and keys that we do not implement.
    """
    section = config.get("quantization_config") or config.get("text_config", {}).get("quantization_config")
    if section is None:
        return QuantizedModules()
    method = section.get("quant_method")
    if method != "compressed-tensors":
        raise _unsupported(f"quant_method {method!r}")
    if section.get("quantization_status", "compressed") != "compressed":
        raise _unsupported(f"quantization_status {section['quantization_status']!r}")
    for key in ("sparsity_config", "transform_config"):
        if section.get(key):
            raise _unsupported(f"a non-empty {key}")
    groups = []
    for name, group in section.get("config_groups", {}).items():
        if group.get("output_activations") is not None:
            raise _unsupported(f"output_activations in {name}")
        if group.get("weights") is None:
            raise _unsupported(f"quantized attention activations in {name}")
        scheme = Scheme(
            weight=_spec(group["weights"]), activation=_activation_spec(group.get("input_activations"))
        )
        stored = group.get("format") or section.get("format")
        if stored != format_name(scheme):
            raise _unsupported(
                f"format {stored!r} in {name} (for this scheme only {format_name(scheme)!r} is)"
            )
        groups.append((tuple(group["targets"]), scheme))
    kv_args = section.get("kv_cache_scheme")
    return QuantizedModules(
        groups=tuple(groups),
        ignore=tuple(section.get("ignore") or ()),
        kv=None if kv_args is None else _kv_scheme(kv_args),
    )


def _weight_args(spec: Spec) -> dict[str, Any]:
    return {**_args(spec), "dynamic": False}


def _activation_args(spec: Spec) -> dict[str, Any]:
    return {**_args(spec), "dynamic": not isinstance(spec.granularity, PerTensor)}


def _args(spec: Spec) -> dict[str, Any]:
    args: dict[str, Any] = {
        "num_bits": spec.bits,
        "type": "int" if isinstance(spec, IntSpec) else "float",
        "symmetric": spec.symmetric,
        "group_size": None,
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


def _kv_args(kv: KVScheme) -> dict[str, Any]:
    strategy = {"tensor": "tensor", "head": "attn_head"}[kv.granularity]
    return {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "group_size": None,
        "strategy": strategy,
        "dynamic": False,
    }


def _spec(args: Mapping[str, Any]) -> Spec:
    granularity = _granularity(args)
    symmetric = args.get("symmetric", True)
    if args.get("actorder") not in (None, False, "weight", "static"):
        raise _unsupported(f"actorder {args['actorder']!r}")
    if args.get("type", "int") == "int":
        return IntSpec(bits=args.get("num_bits", 8), granularity=granularity, symmetric=symmetric)
    if args.get("num_bits") != 8:
        raise _unsupported(f"floating-point numbers of {args.get('num_bits')} bits (NVFP4 and MX formats)")
    return FloatSpec(granularity=granularity)


def _activation_spec(args: Mapping[str, Any] | None) -> Spec | None:
    if args is None:
        return None
    spec = _spec(args)
    dynamic = args.get("dynamic", False)
    if dynamic not in (True, False) or dynamic == isinstance(spec.granularity, PerTensor):
        raise _unsupported(f"activations with strategy {args.get('strategy')!r} and dynamic {dynamic!r}")
    return spec


def _granularity(args: Mapping[str, Any]) -> Granularity:
    match args.get("strategy"):
        case "tensor":
            return PerTensor()
        case "channel":
            return PerChannel()
        case "token":
            return PerToken()
        case "group" if isinstance(args.get("group_size"), int) and args["group_size"] > 0:
            return PerGroup(args["group_size"])
        case "block" if len(args.get("block_structure") or ()) == 2:
            rows, cols = args["block_structure"]
            return PerBlock(rows, cols)
    raise _unsupported(f"strategy {args.get('strategy')!r} with group_size {args.get('group_size')!r}")


def _kv_scheme(args: Mapping[str, Any]) -> KVScheme:
    strategy = args.get("strategy")
    if args.get("type") != "float" or args.get("num_bits") != 8 or strategy not in {"tensor", "attn_head"}:
        raise _unsupported(f"kv_cache_scheme {dict(args)!r}")
    return KVScheme(dtype="fp8", granularity="tensor" if strategy == "tensor" else "head")


def _is_pattern(target: str) -> bool:
    return target.startswith("re:")


def _is_class(target: str) -> bool:
    return target == "Linear"


def _is_name(target: str) -> bool:
    return not _is_pattern(target) and not _is_class(target)


def _matches(module: str, target: str) -> bool:
    if _is_pattern(target):
        return re.match(target[3:], module) is not None
    return target in ("Linear", module)


def _unsupported(finding: str) -> SourceError:
    return SourceError(
        f"config.json: quantization_config has {finding}, which is not supported",
        fix="use a checkpoint that quantkit wrote, or compressed-tensors with INT or FP8 weights",
    )
