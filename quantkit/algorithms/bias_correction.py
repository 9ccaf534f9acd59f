"""Biases that make up for the mean error of a rounded linear. Source: arXiv:1906.04721 section 4.2.

Shape suffixes: N out_features, K in_features.
"""

from torch import Tensor


def bias_correction(w_NK: Tensor, dequantized_NK: Tensor, mean_K: Tensor) -> Tensor:
    """E[(W − Ŵ) x], float32 [N], to be added to the bias. mean_K: mean of the input, float32."""
    return (w_NK.float() - dequantized_NK.float()) @ mean_K.float()
