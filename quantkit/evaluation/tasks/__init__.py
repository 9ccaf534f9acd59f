"""Tasks of lm-eval, our probes among them, asked of a model, and what two models' answers say of the candidate."""

from quantkit.evaluation.tasks.run import TaskResult
from quantkit.evaluation.tasks.session import TaskSession, compare_all

__all__ = ["TaskResult", "TaskSession", "compare_all"]
