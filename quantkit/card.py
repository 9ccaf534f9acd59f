"""The model card of a quantized checkpoint: written by `quantize`, its evaluation filled in by `eval`."""

from collections import Counter
from collections.abc import Mapping

EVALUATION_START = "<!-- quantkit:evaluation -->"
EVALUATION_END = "<!-- /quantkit:evaluation -->"

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
Not evaluated yet: `quantkit eval ORIGINAL THIS_FOLDER` measures the damage and fills this in.
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
        end=EVALUATION_END,
    )
