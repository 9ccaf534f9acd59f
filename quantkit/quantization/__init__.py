"""Quantizing a checkpoint: the run itself, and what it would do and cost."""

from quantkit.quantization.dry_run import DryRun, dry_run
from quantkit.quantization.progress import Step
from quantkit.quantization.record import QuantReport
from quantkit.quantization.run import quantize_checkpoint

__all__ = ["DryRun", "QuantReport", "Step", "dry_run", "quantize_checkpoint"]
