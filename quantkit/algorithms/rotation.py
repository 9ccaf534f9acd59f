"""Orthogonal rotations folded into weights: the product stays, the values to be quantized spread evenly.

With inputs rotated as x' = x · R, a linear that reads them becomes W · R (`hadamard.rotate`), and one that writes them
Rᵀ · W. An embedding [V, K] times R gives rotated rows.
Source: arXiv:2404.00456 (the residual stream), arXiv:2405.16406 section 3 (R1, and R2 between values and
outputs).

Shape suffixes: N out_features, K in_features, D head_dim.
"""

from torch import Tensor

from quantkit.numerics.hadamard import Rotation, rotate


def rotate_outputs(w_NK: Tensor, rotation: Rotation) -> Tensor:
    """Rᵀ · W, so that it writes rotated outputs; a bias [N] becomes bias · R. Dtype as `rotate`."""
    if w_NK.ndim == 1:
        return rotate(w_NK, rotation)
    return rotate(w_NK.T, rotation).T.contiguous()


def rotate_inputs_of_heads(w_NK: Tensor, rotation_D: Rotation) -> Tensor:
    """The same rotation for the inputs of each head: K is heads · D."""
    heads = w_NK.reshape(len(w_NK), -1, len(rotation_D.signs_K))
    return rotate(heads, rotation_D).reshape(w_NK.shape)


def rotate_outputs_of_heads(w_NK: Tensor, rotation_D: Rotation) -> Tensor:
    """The same rotation for the outputs of each head: N is heads · D; a bias [N] likewise."""
    if w_NK.ndim == 1:
        return rotate(w_NK.reshape(-1, len(rotation_D.signs_K)), rotation_D).reshape(w_NK.shape)
    return rotate_inputs_of_heads(w_NK.T, rotation_D).T.contiguous()
