"""Re-open a checkpoint folder and say whether it is complete, correct to the bit, and who can load it.

Works on any compressed-tensors folder, whoever wrote it, and on unquantized ones. A check, so what is wrong is
a finding in the report and not an exception: the command exits with 1 if there are findings, and with 2 if the
folder cannot be read at all (SourceError, UnsupportedModelError). Reads one linear at a time.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from compressed_tensors.quantization import QuantizationConfig
from pydantic import ValidationError

from quantkit.arch import LinearInfo, Role, Survey, complete_survey, survey
from quantkit.errors import SourceError
from quantkit.formats.checkpoint import Checkpoint, open_checkpoint
from quantkit.formats.folder_checks import check_files, check_head, check_kv, check_plan
from quantkit.formats.kv_cache import StoredKV
from quantkit.formats.linear_checks import (
    QUANTIZED_SUFFIXES,
    Finding,
    check_linear,
    stored_shape,
    stored_suffixes,
)
from quantkit.formats.loaders import LinearFacts, LoaderVerdict, loader_verdicts
from quantkit.formats.quantization_config import QuantizedModules, read_quantization
from quantkit.formats.safetensors_file import TensorInfo
from quantkit.schemes import Scheme
from quantkit.schemes.labels import kv_plan_label, scheme_label

_CODE_DTYPES = {torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2}


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What was found in a folder.

    schemes: number of linears by scheme in words ("16 bits" included). num_compared: quantized linears whose
    weights compressed_tensors reads bit for bit as we do. findings: empty if all is well.
    """

    path: str
    num_tensors: int
    num_bytes: int
    schemes: dict[str, int]
    kv_cache: str | None
    num_quantized: int
    num_compared: int
    findings: tuple[Finding, ...]
    loaders: tuple[LoaderVerdict, ...]

    @property
    def is_ok(self) -> bool:
        """Whether nothing is wrong; who can load it is another question."""
        return not self.findings

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        loaders = [
            {**asdict(verdict), "reasons": [reason._asdict() for reason in verdict.reasons]}
            for verdict in self.loaders
        ]
        return {
            **asdict(self),
            "ok": self.is_ok,
            "findings": [finding._asdict() for finding in self.findings],
            "loaders": loaders,
        }


class _Module(NamedTuple):
    """A linear by name; scheme: what config.json says of it; has_codes: whether quantized tensors are stored."""

    scheme: Scheme | None
    has_codes: bool


def verify_checkpoint(
    path: Path, *, on_linear: Callable[[int, int], None] = lambda done, total: None
) -> VerifyReport:
    """Check a folder and decide who can load it; on_linear is told how many quantized linears are done.

    Raises SourceError if the folder cannot be opened or its quantization_config is not one we implement,
    UnsupportedModelError if it is no decoder-only language model.
    """
    checkpoint = open_checkpoint(path)
    config = read_quantization(checkpoint.config)
    modules = _modules(checkpoint, config)
    dense = _dense_view(checkpoint, modules)
    roles = survey(dense)
    kv, findings = check_kv(checkpoint)
    findings += [*check_files(checkpoint), *_check_section(checkpoint), *_check_layers(dense)]
    findings += [*_check_names(checkpoint, config), *_check_heads(checkpoint, roles)]
    quantized = _quantized(modules, roles, findings)
    damaged = 0
    for done, (name, scheme) in enumerate(quantized.items()):
        found = check_linear(checkpoint, name, scheme)
        damaged += bool(found)
        findings += found
        on_linear(done + 1, len(quantized))
    schemes = {linear.name: quantized.get(linear.name) for linear in roles.linears}
    findings += check_plan(checkpoint, schemes, {linear.name: linear.shape for linear in roles.linears}, kv)
    return VerifyReport(
        path=str(path),
        num_tensors=len(checkpoint.tensors),
        num_bytes=checkpoint.num_bytes,
        schemes=dict(Counter("16 bits" if one is None else scheme_label(one) for one in schemes.values())),
        kv_cache=None if kv is None else kv_plan_label(kv.scheme, kv.kept_layers),
        num_quantized=len(quantized),
        num_compared=len(quantized) - damaged,
        findings=tuple(findings),
        loaders=tuple(_loaders(roles.linears, schemes, config, kv)),
    )


def _modules(checkpoint: Checkpoint, config: QuantizedModules) -> dict[str, _Module]:
    """Everything stored with a 2-D weight, or with quantized tensors in place of one."""
    found: dict[str, _Module] = {}
    for info in checkpoint.tensors.values():
        module, _, suffix = info.name.rpartition(".")
        is_weight = suffix == "weight" and len(info.shape) == 2
        if module not in found and (is_weight or suffix in QUANTIZED_SUFFIXES):
            suffixes = stored_suffixes(checkpoint, module)
            weight = checkpoint.tensors.get(f"{module}.weight")
            has_codes = bool(suffixes & QUANTIZED_SUFFIXES) or (
                weight is not None and weight.dtype in _CODE_DTYPES
            )
            found[module] = _Module(config.scheme_of(module), has_codes)
    return found


def _dense_view(checkpoint: Checkpoint, modules: Mapping[str, _Module]) -> Checkpoint:
    """The checkpoint as it would be unquantized: names and shapes only, for asking the architecture."""
    tensors = dict(checkpoint.tensors)
    for name, module in modules.items():
        if not module.has_codes:
            continue
        stored = [tensors.pop(f"{name}.{suffix}") for suffix in stored_suffixes(checkpoint, name) - {"bias"}]
        shape = stored_shape(checkpoint, name, module.scheme) if module.scheme else None
        weight = f"{name}.weight"
        tensors[weight] = TensorInfo(weight, torch.bfloat16, shape or (0, 0), stored[0].file, 0, 0)
    return Checkpoint(checkpoint.path, checkpoint.config, dict(sorted(tensors.items())))


def _quantized(modules: Mapping[str, _Module], roles: Survey, findings: list[Finding]) -> dict[str, Scheme]:
    """The linears to check, in order; adds a finding where config.json and the stored tensors disagree."""
    known = {linear.name for linear in roles.linears}
    known |= {
        stays.name.removesuffix(".weight") for stays in roles.stays if stays.role in {Role.HEAD, Role.ROUTER}
    }
    quantized = {}
    for name, module in modules.items():
        if module.scheme is None and module.has_codes:
            findings.append(
                Finding(name, "quantized tensors", "a 16-bit weight: config.json does not quantize it")
            )
        elif module.scheme is not None and module.has_codes:
            quantized[name] = module.scheme
        elif module.scheme is not None and name in known:
            expected = f"{scheme_label(module.scheme)}, as config.json says, or the module under ignore"
            findings.append(Finding(f"{name}.weight", "a 16-bit weight", expected))
    return quantized


def _check_section(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Whether the package itself accepts the quantization_config."""
    section = checkpoint.config.get("quantization_config")
    if section is None:
        return
    try:
        QuantizationConfig.model_validate(section)
    except (ValidationError, ValueError, TypeError, NotImplementedError) as error:
        yield Finding("config.json: quantization_config", str(error), "valid to compressed_tensors")


def _check_layers(dense: Checkpoint) -> Iterator[Finding]:
    try:
        complete_survey(dense)
    except SourceError as error:
        yield Finding(
            str(dense.path), error.problem, "every layer, module and expert that config.json speaks of"
        )


def _check_names(checkpoint: Checkpoint, config: QuantizedModules) -> Iterator[Finding]:
    """Modules that the config names one by one have to exist."""
    present = {"Linear", "Module", "lm_head"}  # a tied head has no tensor of its own
    for name in checkpoint.tensors:
        while "." in name:
            name = name.rpartition(".")[0]
            if name in present:
                break
            present.add(name)
    named = [("ignore", config.ignore), *(("targets", targets) for targets, _ in config.groups)]
    for key, names in named:
        for name in names:
            if not name.startswith("re:") and name not in present:
                yield Finding(f"config.json: {key}", name, "a module of this checkpoint")


def _check_heads(checkpoint: Checkpoint, roles: Survey) -> Iterator[Finding]:
    by_role = {
        role: [name for name, one in roles.roles.items() if one is role]
        for role in (Role.HEAD, Role.EMBEDDING)
    }
    return check_head(checkpoint, by_role[Role.HEAD], by_role[Role.EMBEDDING])


def _loaders(
    linears: list[LinearInfo],
    schemes: Mapping[str, Scheme | None],
    config: QuantizedModules,
    kv: StoredKV | None,
) -> list[LoaderVerdict]:
    facts = [
        LinearFacts(one.name, one.group, schemes[one.name], one.shape, one.role is Role.EXPERT)
        for one in linears
    ]
    unmatched = [
        one.name
        for one in linears
        if schemes[one.name] is None and config.groups and not config.is_ignored(one.name)
    ]
    scheme, kept = (None, []) if kv is None else (kv.scheme, sorted(kv.kept_layers))
    return loader_verdicts(facts, scheme, kept_layers=kept, unmatched=unmatched)
