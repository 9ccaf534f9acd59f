"""One linear at a time: rows from disk to codes and scales."""

from collections.abc import Iterator

import torch

from quantkit.algorithms.rtn import rtn
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.compressed_tensors import StoredLinear
from quantkit.formats.safetensors_file import check_finite
from quantkit.numerics.sqnr import decibels, signal_and_noise
from quantkit.recipe import LinearPlan
from quantkit.schemes import PerBlock, PerTensor, QParams
from quantkit.schemes.tiles import dequantize_weight

CHUNK_ELEMENTS = 1 << 23  # weights in float32 at a time


def quantize_linear(
    checkpoint: Checkpoint,
    linear: LinearPlan,
    scale_dtype: torch.dtype,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> tuple[StoredLinear, float]:
    """Codes and scales of one linear, and its signal-to-noise ratio in dB (float64 sums, inf if exact).

    chunk_elements: weights in float32 at a time, in whole rows; codes and scales do not depend on it.
    Raises SourceError if a weight is NaN or infinite.
    """
    spec = linear.quantized_to.weight
    codes, parts = [], []
    signal = noise = 0.0
    for start, stop in _row_chunks(linear, chunk_elements):
        w_NK = checkpoint.read_rows(f"{linear.name}.weight", start, stop).float()
        check_finite(checkpoint.info(f"{linear.name}.weight"), w_NK)
        result = rtn(w_NK, spec, scale_dtype, scales=linear.scales)
        sums = signal_and_noise(w_NK, dequantize_weight(result.codes_NK, spec.granularity, result.qparams))
        signal, noise = signal + sums[0], noise + sums[1]
        codes.append(result.codes_NK)
        parts.append(result.qparams)
    zero_points = [part.zero_point for part in parts if part.zero_point is not None]
    qparams = QParams(
        torch.cat([part.scale for part in parts]), torch.cat(zero_points) if zero_points else None
    )
    return StoredLinear(torch.cat(codes), qparams), decibels(signal, noise)


def _row_chunks(linear: LinearPlan, chunk_elements: int) -> Iterator[tuple[int, int]]:
    """Row ranges that can be quantized apart: all rows at once where they share a scale."""
    num_rows, num_cols = linear.shape
    step = max(1, chunk_elements // num_cols)
    match linear.quantized_to.weight.granularity:
        case PerTensor():
            step = num_rows
        case PerBlock(rows, _):
            step = -(-step // rows) * rows
    for start in range(0, num_rows, step):
        yield start, min(start + step, num_rows)
