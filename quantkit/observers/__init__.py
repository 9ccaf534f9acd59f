"""Running statistics of what flows through a layer, gathered while calibration text goes through it."""

from quantkit.observers.inputs import InputStats

__all__ = ["InputStats"]
