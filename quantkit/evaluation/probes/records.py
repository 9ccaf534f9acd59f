"""Invented people and things, for tables, JSON and dialogue."""

from random import Random
from typing import Any

NAMES = ["Alice", "Bruno", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Irene", "Jacob"]
CITIES = ["Berlin", "Lima", "Oslo", "Madrid", "Cairo", "Tokyo", "Boston", "Geneva", "Dublin", "Prague"]
ITEMS = ["chair", "bottle", "mirror", "lamp", "pencil", "bicycle", "ticket", "umbrella", "blanket", "camera"]


def record(rng: Random) -> dict[str, Any]:
    """One order: who, where, what, how many, for how much."""
    return {
        "name": rng.choice(NAMES),
        "city": rng.choice(CITIES),
        "item": rng.choice(ITEMS),
        "count": rng.randint(1, 40),
        "price": round(rng.uniform(1, 300), 2),
        "paid": rng.random() < 0.5,
    }
