"""quantkit: quantize a language model, measure what it cost, and run the result."""

__version__ = "0.1.0"
