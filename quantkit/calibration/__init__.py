"""Quantization with data: tokens, the layers one after the other, what is folded, observed and rounded."""
