"""Calibration text as windows of token ids, spread evenly over the text as evaluation spreads its own."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.errors import TextError
from quantkit.text import load_documents
from quantkit.tokens import load_tokenizer, read_windows, tokenize


class CalibrationTokens(NamedTuple):
    """ids_SL: int64 [samples, length], no padding. spec: as the user wrote it. hash: SHA-256 of shape and ids."""

    ids_SL: Tensor
    spec: str
    hash: str


def calibration_tokens(model: Path, spec: str, samples: int, length: int) -> CalibrationTokens:
    """Windows of the text that SPEC names, by the model's tokenizer; at most `samples`, as many as the text has.

    Raises TextError where the text is unreadable or has not a single window.
    """
    with tokenize(load_documents(spec), load_tokenizer(model)) as stream:
        fitting = len(stream) // length
        if fitting == 0:
            raise TextError(
                f"{spec}: the text has {len(stream)} tokens, and a calibration window needs {length}",
                fix=f"give more text, or --set calibration.length={max(2, len(stream) // 4)}",
            )
        windows = list(read_windows(stream, min(samples, fitting), length))
    return with_hash(torch.stack(windows), spec)


def with_hash(ids_SL: Tensor, spec: str) -> CalibrationTokens:
    """Tokens and their hash: shape and ids as little-endian int32."""
    digest = hashlib.sha256(f"{tuple(ids_SL.shape)}\0".encode())
    digest.update(ids_SL.numpy().astype("<i4").tobytes())
    return CalibrationTokens(ids_SL, spec, digest.hexdigest())
