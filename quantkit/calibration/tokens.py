"""Calibration text as windows of token ids, spread evenly over the text as evaluation spreads its own."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.errors import TextError
from quantkit.text import Message, contents, load_documents
from quantkit.tokens import Tokenizer, load_tokenizer, read_windows, tokenize


class CalibrationTokens(NamedTuple):
    """ids_SL: int64 [samples, length], no padding. spec: as the user wrote it. hash: SHA-256 of shape and ids.

    roles: how the roles of conversations are in the text, in words; None where there were none.
    """

    ids_SL: Tensor
    spec: str
    hash: str
    roles: str | None = None


def calibration_tokens(model: Path, spec: str, samples: int, length: int) -> CalibrationTokens:
    """Windows of the text that SPEC names, by the model's tokenizer; at most `samples`, as many as the text has.

    Conversations are rendered by the model's chat template, then joined by blank lines as all documents are.
    Raises TextError where the text is unreadable or has not a single window.
    """
    tokenizer = load_tokenizer(model)
    render = ChatTemplate(tokenizer)
    with tokenize(load_documents(spec, render, use="calibrate"), tokenizer) as stream:
        fitting = len(stream) // length
        if fitting == 0:
            raise TextError(
                f"{spec}: the text has {len(stream)} tokens, and a calibration window needs {length}",
                fix=f"give more text, or --set calibration.length={max(2, len(stream) // 4)}",
            )
        windows = list(read_windows(stream, min(samples, fitting), length))
    return with_hash(torch.stack(windows), spec)._replace(roles=render.roles)


def with_hash(ids_SL: Tensor, spec: str) -> CalibrationTokens:
    """Tokens and their hash: shape and ids as little-endian int32."""
    digest = hashlib.sha256(f"{tuple(ids_SL.shape)}\0".encode())
    digest.update(ids_SL.numpy().astype("<i4").tobytes())
    return CalibrationTokens(ids_SL, spec, digest.hexdigest())


class ChatTemplate:
    """Renders conversations as the model is given them, or, if it has no template, what was said alone."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.num_rendered = 0

    @property
    def roles(self) -> str | None:
        """What became of the roles, in words; None if nothing was rendered."""
        if self.num_rendered == 0:
            return None
        if self._tokenizer.backend.chat_template:
            return "by the model's chat template"
        return "left out: the model has no chat template"

    def __call__(self, messages: list[Message], place: str) -> str:
        """The text of a conversation. Raises TextError naming the place if the template refuses it."""
        self.num_rendered += 1
        if not self._tokenizer.backend.chat_template:
            return contents(messages, place)
        try:
            text: str = self._tokenizer.backend.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # a template may fail in any way that an expression can
            raise TextError(
                f"{place}: the model's chat template does not take this conversation ({error})",
                fix="repair or remove the row; or give its text as `text` instead of `messages`",
            ) from error
        return text
