"""Quantization with data: text goes through the model a layer at a time, and each layer is rounded on what it sees."""

from quantkit.calibration.loop import calibrate
from quantkit.calibration.tokens import CalibrationTokens, calibration_tokens

__all__ = ["CalibrationTokens", "calibrate", "calibration_tokens"]
