"""What is known of the checkpoint that is served, for the page: what was done to it, and what that cost."""

from collections import Counter
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from quantkit.card import Evaluation, read_evaluation
from quantkit.errors import SourceError
from quantkit.formats.checkpoint import read_json
from quantkit.formats.folder import PLAN_NAME

CARD_NAME = "README.md"
STAYS = "16 bits"


class SchemeFacts(TypedDict):
    """Linears that were treated alike. reason: why they stay in 16 bits. least_sqnr_db: of the worst of them."""

    scheme: str
    num_linears: int
    reason: str | None
    least_sqnr_db: float | None


class Measured(TypedDict):
    """Of the model card. rows: what, the original's, this model's."""

    rows: list[tuple[str, str, str]]
    remarks: list[str]


class Facts(TypedDict):
    """evaluation: None if nobody has measured the damage."""

    source: str
    description: str
    quantkit: str
    bits_per_weight: float
    kv_cache: str | None
    schemes: list[SchemeFacts]
    evaluation: Measured | None


class ServedFacts(TypedDict):
    """sampling: where a request says nothing. checkpoint: None if it was not made by quantkit."""

    model: str
    max_model_len: int
    num_kv_tokens: int
    device: str
    sampling: dict[str, Any]
    checkpoint: Facts | None


def read_facts(folder: Path) -> Facts | None:
    """Of a folder that `quantize` wrote; None for any other. Raises SourceError if its record is damaged."""
    if not (folder / PLAN_NAME).is_file():
        return None
    card = folder / CARD_NAME
    evaluation = read_evaluation(card.read_text(encoding="utf-8")) if card.is_file() else None
    try:
        return _facts(read_json(folder / PLAN_NAME), evaluation)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError) as error:
        raise SourceError(
            f"{folder / PLAN_NAME}: not what quantkit writes ({error!r})",
            fix="quantize again, or remove the file",
        ) from None


def _facts(plan: Any, evaluation: Evaluation | None) -> Facts:
    linears: list[dict[str, Any]] = list(plan["linears"].values())
    return {
        "source": plan["source"]["name"],
        "description": plan["recipe"]["description"],
        "quantkit": plan["quantkit"],
        "bits_per_weight": _bits_per_weight(linears),
        "kv_cache": plan["kv_cache"],
        "schemes": _schemes(linears),
        "evaluation": evaluation and {"rows": evaluation.rows, "remarks": evaluation.remarks},
    }


def _schemes(linears: list[dict[str, Any]]) -> list[SchemeFacts]:
    """The commonest first."""
    counts = Counter((linear["scheme"], linear.get("reason")) for linear in linears)
    return [
        {
            "scheme": scheme or STAYS,
            "num_linears": count,
            "reason": reason,
            "least_sqnr_db": _least_sqnr(linears, scheme),
        }
        for (scheme, reason), count in counts.most_common()
    ]


def _least_sqnr(linears: list[dict[str, Any]], scheme: str | None) -> float | None:
    """None where all are exact, or stay as they were."""
    found = [linear["sqnr_db"] for linear in linears if scheme and linear["scheme"] == scheme]
    return min((each for each in found if each is not None), default=None)


def _bits_per_weight(linears: list[dict[str, Any]]) -> float:
    """Over all weights of all linears, as `eval` counts them."""
    sizes: list[int] = [linear["shape"][0] * linear["shape"][1] for linear in linears]
    bits: list[float] = [linear.get("bits_per_weight", 16) for linear in linears]
    return sum(size * each for size, each in zip(sizes, bits, strict=True)) / sum(sizes)
