"""Whether the layers of a known architecture are all there, with all their modules and experts."""

from collections import defaultdict
from collections.abc import Iterator

from quantkit.arch.families import Family, Role
from quantkit.arch.names import place_of
from quantkit.formats.checkpoint import Checkpoint

Modules = set[tuple[str, int | None]]  # name below the layer, expert number


def check_layers(checkpoint: Checkpoint, family: Family) -> None:
    """Raise SourceError unless every layer that the config counts is there with all its modules.

    Attention is in every layer. A layer with mlp.gate_proj has to have mlp.up_proj and mlp.down_proj;
    a layer with one expert, all experts.
    """
    layers: dict[int, Modules] = defaultdict(set)
    prefix = ""
    for name in checkpoint.tensors:
        module, _, leaf = name.rpartition(".")
        place = place_of(module)
        if place and leaf == "weight":
            layers[place.layer].add((place.rest, place.expert))
            prefix = place.prefix.removesuffix(f"{place.layer}.")
    num_layers = _num_layers(checkpoint) or len(layers)
    surplus = [layer for layer in sorted(layers) if layer >= num_layers]
    if surplus:
        raise checkpoint.mismatch(f"holds {prefix}{surplus[0]} but config.json counts {num_layers} layers")
    num_experts = _num_experts(checkpoint)
    for layer in range(num_layers):  # the counts are the config's word: nothing may be made of their size
        for module, expert in _expected(layers[layer], family, num_experts):
            if (module, expert) not in layers[layer]:
                raise checkpoint.mismatch(f"{prefix}{layer}.{module.format(expert)} is missing")


def _expected(present: Modules, family: Family, num_experts: int | None) -> Iterator[tuple[str, int | None]]:
    """What has to be in a layer that has these modules, one after another."""
    roles = {part.name: part.role for part in family}
    groups = {_siblings(name, roles[name]) for name, _ in present if name in roles}
    groups.add(("self_attn", Role.ATTENTION))
    found = [expert for _, expert in present if expert is not None]
    experts = range(num_experts or 1 + max(found, default=0))
    for part in family:
        if _siblings(part.name, part.role) in groups:
            yield from ((part.name, expert) for expert in (experts if part.role is Role.EXPERT else [None]))


def _siblings(name: str, role: Role) -> tuple[str, Role]:
    """What comes together: modules of one parent and one role."""
    return name.rpartition(".")[0], role


def _num_layers(checkpoint: Checkpoint) -> int | None:
    is_nested = checkpoint.text_config is not checkpoint.config
    if is_nested and "num_hidden_layers" not in checkpoint.text_config:
        return None  # the config of a multimodal model leaves out what equals its default
    return checkpoint.count("num_hidden_layers")


def _num_experts(checkpoint: Checkpoint) -> int | None:
    key = next((key for key in ("num_local_experts", "num_experts") if key in checkpoint.text_config), None)
    return checkpoint.count(key) if key else None
