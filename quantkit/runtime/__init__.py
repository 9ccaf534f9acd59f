"""Runs a checkpoint, quantized or not, exactly as it is stored: what `eval` measures and `generate` serves."""
