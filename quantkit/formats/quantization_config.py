"""config.json → `quantization_config`: which modules are quantized with which scheme, by name.

Both ways: parse the section of any checkpoint, write the section of ours. What the tensors of a module look
like is `compressed_tensors`' business, the JSON of one scheme `quantization_args`'.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quantkit.formats.compressed_tensors import format_name
from quantkit.formats.quantization_args import group_json, kv_json, parse_group, parse_kv, unsupported
from quantkit.schemes import KVScheme, Scheme

PACKAGE_VERSION = "0.20.0"  # whose layout this is; readers of other versions see it in the file
_CLASSES = ("Linear", "Module")  # the classes that every linear is an instance of


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedModules:
    """A parsed quantization_config; of an unquantized model it is empty.

    groups: (targets, scheme) in the order of the file. kv: the FP8 cache that the config names, or None.
    """

    groups: tuple[tuple[tuple[str, ...], Scheme], ...] = ()
    ignore: tuple[str, ...] = ()
    kv: KVScheme | None = None
    _ignored: "_Targets" = field(init=False, repr=False, compare=False)
    _targeted: "_Targets" = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        schemes = {target: scheme for targets, scheme in self.groups for target in targets}
        object.__setattr__(self, "_ignored", _Targets.of(dict.fromkeys(self.ignore)))
        object.__setattr__(self, "_targeted", _Targets.of(schemes))

    def scheme_of(self, module: str) -> Scheme | None:
        """The scheme of a linear by its full name, None if it stays 16-bit.

        As compressed-tensors matches: `ignore` beats targets; then an exact name, then the `re:` patterns
        (anchored at the start) in alphabetical order, then the class `Linear`. A target that two groups
        name belongs to the last one.
        """
        if self.is_ignored(module):
            return None
        target = self._targeted.first(module)
        return None if target is None else self._targeted.schemes[target]

    def is_ignored(self, module: str) -> bool:
        """Whether `ignore` names this linear, by name, pattern or class."""
        return self._ignored.first(module) is not None


@dataclass(frozen=True, slots=True)
class _Targets:
    """Names, patterns and class names with the scheme of each, ready to be matched."""

    schemes: Mapping[str, Scheme | None]
    patterns: tuple[tuple[str, re.Pattern[str]], ...]

    @staticmethod
    def of(schemes: Mapping[str, Scheme | None]) -> "_Targets":
        patterns = sorted(target for target in schemes if target.startswith("re:"))
        return _Targets(schemes, tuple((target, _compile(target)) for target in patterns))

    def first(self, module: str) -> str | None:
        if module in self.schemes:
            return module
        matching = (target for target, pattern in self.patterns if pattern.match(module))
        by_class = (target for target in _CLASSES if target in self.schemes)
        return next(matching, None) or next(by_class, None)


def _compile(target: str) -> re.Pattern[str]:
    try:
        return re.compile(target.removeprefix("re:"))
    except re.error as error:
        raise unsupported(f"the target {target!r}, not a regular expression ({error})") from None


def write_quantization(
    schemes: Mapping[str, Scheme | None], kv: KVScheme | None, *, extra_ignore: Sequence[str] = ()
) -> dict[str, Any]:
    """The quantization_config for linears by name (None: stays 16-bit).

    One scheme for all targets the class `Linear`, with every other linear named under `ignore`; several are
    told apart by naming their modules. extra_ignore: further modules that a loader may take for linears.
    The experts' scheme is the first group: transformers takes the first one for all experts.
    """
    modules: dict[Scheme, list[str]] = {}
    for module, scheme in sorted(schemes.items(), key=lambda item: ".experts." not in item[0]):
        if scheme is not None:
            modules.setdefault(scheme, []).append(_target(module))
    groups = {
        f"group_{number}": group_json(scheme, names if len(modules) > 1 else ["Linear"])
        for number, (scheme, names) in enumerate(modules.items())
    }
    formats = sorted({format_name(scheme) for scheme in modules})
    model_format = formats[0] if len(formats) == 1 else "mixed-precision" if formats else "dense"
    ignore = [*(_target(module) for module, scheme in schemes.items() if scheme is None), *extra_ignore]
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",  # without it transformers takes the codes for weights
        "format": model_format,
        "config_groups": groups,
        "ignore": list(dict.fromkeys(ignore)),
        "kv_cache_scheme": None if kv is None else kv_json(kv),
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
        "version": PACKAGE_VERSION,
    }


def _target(module: str) -> str:
    """A linear's name, or for one of a nested language model a pattern that holds under every loader's naming.

    language_model.model.layers.0… on disk and in vLLM is model.language_model.layers.0… in transformers.
    """
    nested = re.fullmatch(r"(?:model\.)?language_model\.(?:.+\.)?(layers\..+)", module)
    return rf"re:.*\blanguage_model\.(.*\.)?{re.escape(nested[1])}$" if nested else module


def read_quantization(config: Mapping[str, Any]) -> QuantizedModules:
    """Parse the quantization_config of a config.json; an unquantized model gives an empty one.

    Raises SourceError for another quant_method, and for formats and keys that we do not implement.
    """
    section = _section(config)
    if section is None:
        return QuantizedModules()
    if not isinstance(section, Mapping):
        raise unsupported(f"the value {section!r}")
    if section.get("quant_method") != "compressed-tensors":
        raise unsupported(f"quant_method {section.get('quant_method')!r}")
    status = section.get("quantization_status")
    if status != "compressed":
        raise unsupported(f"quantization_status {status!r} instead of 'compressed'")
    for key in ("sparsity_config", "transform_config", "moe_sparsity_config"):
        if section.get(key):
            raise unsupported(f"a non-empty {key}")
    groups, ignore = section.get("config_groups") or {}, section.get("ignore") or []
    if not isinstance(groups, Mapping):
        raise unsupported(f"config_groups {groups!r}")
    if not isinstance(ignore, list) or not all(isinstance(target, str) for target in ignore):
        raise unsupported(f"ignore {ignore!r}")
    parsed = tuple(parse_group(name, group, section.get("format")) for name, group in groups.items())
    if any("Embedding" in targets for targets, _ in parsed):
        raise unsupported("quantized embeddings (the target 'Embedding')")
    kv = section.get("kv_cache_scheme")
    return QuantizedModules(groups=parsed, ignore=tuple(ignore), kv=None if kv is None else parse_kv(kv))


def _section(config: Mapping[str, Any]) -> Any:
    nested = config.get("text_config")
    for part in (config, nested if isinstance(nested, Mapping) else {}):
        if part.get("compression_config"):
            raise unsupported("a compression_config in its place, the form before compressed-tensors 0.7")
        if part.get("quantization_config") is not None:
            return part["quantization_config"]
    return None
