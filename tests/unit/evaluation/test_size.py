"""Bits per weight, by hand."""

import pytest
import torch

from quantkit.evaluation.size import measure_size
from quantkit.formats.checkpoint import open_checkpoint
from tests.tiny_llama import HIDDEN, INNER, LAYERS, tiny_tensors, write_tiny_llama

ATTENTION = LAYERS * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN // 2)
MLP = LAYERS * 3 * HIDDEN * INNER


def size_of(tmp_path, tensors):
    return measure_size(open_checkpoint(write_tiny_llama(tmp_path / "model", tensors)))


def with_mlp(replace):
    """The tiny model, with each MLP weight replaced by what `replace` gives for it, by suffix."""
    tensors = {}
    for name, tensor in tiny_tensors().items():
        module, _, leaf = name.rpartition(".")
        if ".mlp." in name:
            tensors |= {f"{module}.{suffix}": part for suffix, part in replace(tensor).items()}
        else:
            tensors[f"{module}.{leaf}"] = tensor
    return tensors


def test_an_unquantized_model_has_the_bits_of_its_dtype(tmp_path):
    size = size_of(tmp_path, tiny_tensors())
    assert size.bits_per_weight == 16.0
    assert size.bytes == sum(tensor.nbytes for tensor in tiny_tensors().values())


def test_packed_int4_counts_codes_scales_and_shapes(tmp_path):
    def replace(w_NK):
        rows, cols = w_NK.shape
        return {
            "weight_packed": torch.zeros(rows, cols // 8, dtype=torch.int32),
            "weight_scale": torch.ones(rows, cols // 16, dtype=torch.bfloat16),
            "weight_shape": torch.tensor([rows, cols]),
        }

    size = size_of(tmp_path, with_mlp(replace))
    mlp_bits = MLP * (4 + 16 / 16) + LAYERS * 3 * 128
    assert size.bits_per_weight == pytest.approx((16 * ATTENTION + mlp_bits) / (ATTENTION + MLP), rel=1e-12)


def test_fp8_counts_codes_and_scales_of_both_sides(tmp_path):
    def replace(w_NK):
        return {
            "weight": w_NK.to(torch.float8_e4m3fn),
            "weight_scale": torch.ones(len(w_NK), 1, dtype=torch.bfloat16),
            "input_scale": torch.ones(1, dtype=torch.bfloat16),
        }

    size = size_of(tmp_path, with_mlp(replace))
    mlp_bits = 8 * MLP + LAYERS * 16 * (2 * INNER + HIDDEN + 3)
    assert size.bits_per_weight == pytest.approx((16 * ATTENTION + mlp_bits) / (ATTENTION + MLP), rel=1e-12)


def test_biases_do_not_count_as_weights(tmp_path):
    tensors = tiny_tensors()
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(HIDDEN, dtype=torch.bfloat16)
    assert size_of(tmp_path, tensors).bits_per_weight == 16.0
