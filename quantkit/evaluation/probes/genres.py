"""Texts of several genres, for their perplexity: what quantization costs differs between them."""

import json
from random import Random
from typing import Any

from quantkit.evaluation.probes import corpus
from quantkit.evaluation.probes.records import record


def prose(rng: Random, index: int) -> dict[str, Any]:
    """Three paragraphs."""
    texts = corpus.paragraphs()
    return _text("\n\n".join(texts[(3 * index + offset) % len(texts)] for offset in range(3)))


def code(rng: Random, index: int) -> dict[str, Any]:
    """An example of Python code."""
    return _text(corpus.code()[index % len(corpus.code())])


def table(rng: Random, index: int, *, rows: int = 12) -> dict[str, Any]:
    """A Markdown table of invented orders, sorted by name, with a column that follows from two others."""
    orders = sorted((record(rng) for _ in range(rows)), key=lambda order: str(order["name"]))
    lines = ["| name | city | item | count | price | total |", "|---|---|---|---:|---:|---:|"]
    for order in orders:
        total = order["count"] * order["price"]
        cells = [
            order["name"],
            order["city"],
            order["item"],
            order["count"],
            f"{order['price']:.2f}",
            f"{total:.2f}",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return _text("\n".join(lines))


def json_lines(rng: Random, index: int, *, rows: int = 6) -> dict[str, Any]:
    """A list of orders as indented JSON."""
    return _text(json.dumps([record(rng) for _ in range(rows)], indent=2))


def dialogue(rng: Random, index: int, *, turns: int = 5) -> dict[str, Any]:
    """Questions and answers about orders that a list at the beginning tells."""
    orders = [record(rng) for _ in range(turns)]
    listed = [
        f"{number}. {order['name']} from {order['city']} ordered {order['count']} {order['item']}s."
        for number, order in enumerate(orders, start=1)
    ]
    talk = []
    for order in rng.sample(orders, turns):
        talk += [
            f"User: How many {order['item']}s did {order['name']} order?",
            f"Assistant: {order['name']} ordered {order['count']} of them, to be sent to {order['city']}.",
        ]
    return _text("\n".join(["These orders came in today:", *listed, "", *talk]))


def _text(text: str) -> dict[str, Any]:
    return {"prompt": "", "target": text}
