"""Shapes of weights to measure: those of a layer of a known size, or any other.

Shape suffixes: N out_features, K in_features.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from quantkit.errors import BenchError


class WeightShape(NamedTuple):
    """name: what it is in a layer, or its sides."""

    name: str
    n: int
    k: int


LAYERS = {  # Llama 3.1: linears that read one input are one
    "8b": (
        WeightShape("qkv", 6144, 4096),
        WeightShape("o", 4096, 4096),
        WeightShape("gate_up", 28672, 4096),
        WeightShape("down", 4096, 14336),
    ),
    "70b": (
        WeightShape("qkv", 10240, 8192),
        WeightShape("o", 8192, 8192),
        WeightShape("gate_up", 57344, 8192),
        WeightShape("down", 8192, 28672),
    ),
}


def parse_shapes(text: str) -> tuple[WeightShape, ...]:
    """`8b`, `70b` or `N,K`."""
    if text in LAYERS:
        return LAYERS[text]
    match = re.fullmatch(r"([1-9]\d*),([1-9]\d*)", text)
    if match is None:
        raise BenchError(f"--shape {text}: no such layer, nor a shape", fix=f"use {', '.join(LAYERS)} or N,K")
    n, k = int(match[1]), int(match[2])
    return (WeightShape(f"{n}x{k}", n, k),)


def parse_rows(text: str) -> tuple[int, ...]:
    """Numbers of rows: `1,8,16`; each once, ascending."""
    if re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text) is None:
        raise BenchError(f"--rows {text}: expected numbers from 1 on", fix="write them like 1,8,16")
    return tuple(sorted(set(map(int, text.split(",")))))


def parse_names(text: str, known: Sequence[str]) -> tuple[str, ...]:
    """Families by their names: `w4a16,w8a16`, in the order of the catalog."""
    asked = text.split(",")
    for name in asked:
        if name not in known:
            raise BenchError(f"--families {text}: no family {name!r} here", fix=f"use {', '.join(known)}")
    return tuple(name for name in known if name in asked)
