"""The model card of a quantized checkpoint: written by `quantize`, its evaluation filled in by `eval`."""

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

EVALUATION_START = "<!-- quantkit:evaluation -->"
EVALUATION_END = "<!-- /quantkit:evaluation -->"
NOT_EVALUATED = (
    "Not evaluated yet: `quantkit eval ORIGINAL THIS_FOLDER` measures the damage and fills this in."
)

_CARD = """\
---
base_model: {base}
library_name: transformers
tags:
- quantkit
- compressed-tensors
---
# {base}, quantized

{what}

| Linears | Scheme |
|---|---|
{rows}

Size {after:.3f} GB, was {before:.3f} GB. Format: compressed-tensors. Made with quantkit {version}; every
choice is in `quantkit.json`.

## Evaluation

{start}
{evaluation}
{end}
"""


def first_card(
    *,
    base: str,
    description: str,
    treatments: Mapping[str, str],
    before_bytes: int,
    after_bytes: int,
    version: str,
) -> str:
    """The card before any evaluation. treatments: linear -> scheme, or the reason why it stays."""
    counts = Counter(treatments.values())
    return _CARD.format(
        base=base,
        what=description or "Weights of the linear layers quantized.",
        rows="\n".join(f"| {count} | {treatment} |" for treatment, count in counts.items()),
        before=before_bytes / 1e9,
        after=after_bytes / 1e9,
        version=version,
        start=EVALUATION_START,
        evaluation=NOT_EVALUATED,
        end=EVALUATION_END,
    )


class Evaluation(NamedTuple):
    """What the card says was measured. rows: what, the original's, this model's; remarks: how, and what else."""

    rows: list[tuple[str, str, str]]
    remarks: list[str]


def read_evaluation(card: str) -> Evaluation | None:
    """The evaluation section of a card; None where a card has none, or was not filled in."""
    _, start, rest = card.partition(EVALUATION_START)
    section, end, _ = rest.partition(EVALUATION_END)
    if not start or not end or section.strip() == NOT_EVALUATED:
        return None
    lines = [line.strip() for line in section.splitlines() if line.strip()]
    table = [line.strip("|").split("|") for line in lines if line.startswith("|")]
    rows = [
        (name.strip(), original.strip(), ours.strip()) for name, original, ours in table[2:]
    ]  # under its head
    return Evaluation(
        rows, [line.replace("`", "").replace("**", "") for line in lines if not line.startswith("|")]
    )
