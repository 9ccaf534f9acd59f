"""Tensor names of the language model, whatever it is nested in: layer number, and name below the layer.

The vocabulary of prefixes is closed, so the layers of a vision or audio tower are never taken for decoder
layers.
"""

import re
from typing import NamedTuple

LANGUAGE_PREFIX = r"(?:(?:model|language_model|text_model|decoder|transformer|gpt_neox|backbone)\.)*"
_IN_LAYER = re.compile(rf"(?P<prefix>{LANGUAGE_PREFIX}(?:layers|h|blocks)\.(?P<layer>\d+)\.)(?P<rest>.+)")
_EXPERT = re.compile(r"(?<=\bexperts\.)(\d+)(?=\.)")


class Place(NamedTuple):
    """Where a tensor or module of a decoder layer is: `prefix` + `rest` is its full name.

    rest: name below the layer with any expert number replaced by {}, e.g. "mlp.experts.{}.up_proj".
    """

    prefix: str
    layer: int
    rest: str
    expert: int | None


def place_of(name: str) -> Place | None:
    """The place of a tensor or module in the decoder, or None if it is in no decoder layer."""
    match = _IN_LAYER.fullmatch(name)
    if match is None:
        return None
    expert = _EXPERT.search(match["rest"])
    rest = _EXPERT.sub("{}", match["rest"])
    return Place(match["prefix"], int(match["layer"]), rest, int(expert[1]) if expert else None)


def below_layer(name: str) -> str:
    """The name of something in a decoder layer without the prefix of its layer."""
    place = place_of(name)
    assert place is not None, f"{name} is in a layer"
    return name.removeprefix(place.prefix)
