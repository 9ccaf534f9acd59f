"""What a candidate lost against its original: perplexity, KL divergence, top-1 agreement, size, gates, card."""

from quantkit.evaluation.card import fill_card
from quantkit.evaluation.evaluate import Listener, evaluate
from quantkit.evaluation.gates import Gates, describe_failure, parse_percent
from quantkit.evaluation.junit import write_junit
from quantkit.evaluation.markdown import write_markdown
from quantkit.evaluation.page import write_page
from quantkit.evaluation.report import (
    CandidateReport,
    Damage,
    DataInfo,
    EvalReport,
    Flip,
    GateResult,
    ReferenceReport,
    TaskComparison,
)

__all__ = [
    "CandidateReport",
    "Damage",
    "DataInfo",
    "EvalReport",
    "Flip",
    "GateResult",
    "Gates",
    "Listener",
    "ReferenceReport",
    "TaskComparison",
    "describe_failure",
    "evaluate",
    "fill_card",
    "parse_percent",
    "write_junit",
    "write_markdown",
    "write_page",
]
