"""What is in a checkpoint, counted: roles, dtypes, what can be quantized and with which group sizes."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

from quantkit.arch.families import Role
from quantkit.arch.linears import LinearInfo, complete_survey, survey
from quantkit.arch.names import place_of
from quantkit.arch.refusals import already_quantized
from quantkit.formats.checkpoint import Checkpoint, read_json
from quantkit.formats.safetensors_file import TensorInfo
from quantkit.schemes.support import GROUP_SIZES


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """Tensors of one kind: how many, how many values, how many bytes."""

    name: str
    tensors: int
    values: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantizable:
    """Linears of one role and input width; the group sizes divide all that they are fused with."""

    role: str
    in_features: int
    linears: int
    parameters: int
    group_sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What `quantkit inspect` says.

    quantized: the method, if the checkpoint is quantized already; then its parameters are not counted.
    """

    path: str
    architecture: str | None
    model_type: str
    parameters: int | None
    bytes: int
    shards: int
    layers: int
    vocabulary: int | None
    tied_head: bool
    chat_template: bool
    quantized: str | None
    dtypes: tuple[Count, ...]
    roles: tuple[Count, ...]
    quantizable: tuple[Quantizable, ...]
    stays: tuple[Count, ...]


def inspect_checkpoint(checkpoint: Checkpoint) -> Inspection:
    """Count a checkpoint; reads headers only.

    Raises what `complete_survey` raises; of a checkpoint that is quantized already, nothing is quantizable.
    """
    config = checkpoint.config
    quantized = already_quantized(config)
    found = survey(checkpoint) if quantized else complete_survey(checkpoint)
    tensors = list(checkpoint.tensors.values())
    architectures = config.get("architectures") or [None]
    vocabulary = checkpoint.text_config.get("vocab_size")
    return Inspection(
        path=str(checkpoint.path),
        architecture=architectures[0],
        model_type=checkpoint.model_type,
        parameters=None if quantized else sum(prod(info.shape) for info in tensors),
        bytes=checkpoint.num_bytes,
        shards=len({info.file for info in tensors}),
        layers=len({place.layer for place in map(place_of, checkpoint.tensors) if place}),
        vocabulary=vocabulary if isinstance(vocabulary, int) else None,
        tied_head=Role.HEAD not in found.roles.values(),
        chat_template=_has_chat_template(checkpoint.path),
        quantized=quantized,
        dtypes=_counts((str(info.dtype).removeprefix("torch."), info) for info in tensors),
        roles=_counts((found.roles[info.name].value, info) for info in tensors),
        quantizable=() if quantized else _quantizable(found.linears),
        stays=() if quantized else _counts((stay.reason, checkpoint.info(stay.name)) for stay in found.stays),
    )


def _has_chat_template(path: Path) -> bool:
    if (path / "chat_template.jinja").is_file() or (path / "chat_template.json").is_file():
        return True
    file = path / "tokenizer_config.json"
    settings = read_json(file) if file.is_file() else {}
    return isinstance(settings, dict) and bool(settings.get("chat_template"))


def _counts(named: Iterable[tuple[str, TensorInfo]]) -> tuple[Count, ...]:
    """Counts per name, the largest first."""
    tensors: dict[str, list[TensorInfo]] = defaultdict(list)
    for name, info in named:
        tensors[name].append(info)
    counts = [
        Count(
            name=name,
            tensors=len(infos),
            values=sum(prod(info.shape) for info in infos),
            bytes=sum(info.num_bytes for info in infos),
        )
        for name, infos in tensors.items()
    ]
    return tuple(sorted(counts, key=lambda count: (-count.bytes, count.name)))


def _quantizable(linears: list[LinearInfo]) -> tuple[Quantizable, ...]:
    widths: dict[str, set[int]] = defaultdict(set)
    for linear in linears:
        widths[linear.group].add(linear.shape[1])
    kinds: dict[tuple[Role, int, tuple[int, ...]], list[LinearInfo]] = defaultdict(list)
    for linear in linears:
        sizes = tuple(
            size for size in reversed(GROUP_SIZES) if all(width % size == 0 for width in widths[linear.group])
        )
        kinds[linear.role, linear.shape[1], sizes].append(linear)
    return tuple(
        Quantizable(
            role=role.value,
            in_features=in_features,
            linears=len(members),
            parameters=sum(prod(linear.shape) for linear in members),
            group_sizes=sizes,
        )
        for (role, in_features, sizes), members in kinds.items()
    )
