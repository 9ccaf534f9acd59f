"""Quantization algorithms as pure functions: weights (and statistics) in, codes and scales out."""
