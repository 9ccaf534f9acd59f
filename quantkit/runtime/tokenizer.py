"""A checkpoint's tokenizer as generation needs it: prompts to ids, ids to text that grows by whole characters."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from quantkit import tokens
from quantkit.errors import GenerationError, SourceError
from quantkit.formats.checkpoint import Checkpoint, read_json

UNFINISHED = "�"  # what a tokenizer puts for bytes that are not (yet) a character


class Tokenizer:
    """Encodes and decodes with special tokens; `backend` is transformers' own object."""

    def __init__(self, path: Path, backend: Any) -> None:
        self.path = path
        self.backend = backend

    @property
    def has_chat_template(self) -> bool:
        """Whether a prompt is a message of a conversation, rather than the start of a text."""
        return bool(self.backend.chat_template)

    def encode_prompt(self, prompt: str, *, raw: bool) -> list[int]:
        """Token ids of a prompt: as the user's message in the chat template, or, if there is none or raw, as is."""
        if not prompt.isascii() and any("\ud800" <= character <= "\udfff" for character in prompt):
            raise GenerationError("the prompt is not UTF-8 text", fix="write it in UTF-8")
        if raw or not self.has_chat_template:
            return self._checked(self.backend(prompt)["input_ids"])
        messages = [{"role": "user", "content": prompt}]
        try:
            ids = self.backend.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        except Exception as error:  # a template may fail in any way that an expression can
            raise SourceError(
                f"{self.path}: its chat template fails ({error})",
                fix="repair the template, or send the prompt with --raw",
            ) from error
        return self._checked(ids)

    def decode(self, token_ids: list[int]) -> str:
        """Text of token ids, special tokens left out."""
        text: str = self.backend.decode(
            token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def _checked(self, ids: list[int]) -> list[int]:
        if not ids:
            raise GenerationError("the prompt has no tokens", fix="give a prompt that is not empty")
        return list(ids)


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder. Raises SourceError if it holds none that can be read."""
    return Tokenizer(path, tokens.load_tokenizer(path).backend)


def stop_tokens(checkpoint: Checkpoint, tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that end an answer: of generation_config.json (else config.json), and the tokenizer's own.

    Raises SourceError if a file names something that is no token: the answer would never end.
    """
    file = checkpoint.path / "generation_config.json"
    settings = read_json(file) if file.is_file() else {}
    if not isinstance(settings, dict):
        raise SourceError(f"{file}: not a JSON object", fix="fetch this file again, or remove it")
    declared = settings.get("eos_token_id")
    if declared is None:
        file = checkpoint.path / "config.json"
        declared = checkpoint.text_config.get("eos_token_id", checkpoint.config.get("eos_token_id"))
    ids = [] if declared is None else declared if isinstance(declared, list) else [declared]
    wrong = next((token for token in ids if type(token) is not int), None)
    if wrong is not None:
        raise SourceError(f"{file}: eos_token_id {wrong!r} is no token's number", fix="fetch this file again")
    own = tokenizer.backend.eos_token_id
    return frozenset(ids if own is None else [*ids, own])


class Detokenizer:
    """Turns tokens into text piece by piece; the pieces join to `decode` of all tokens, and no piece ends inside
    a character whose other bytes may still come.

        tokens   |---- given out, context kept ----|---- new ----|
                 ^ _start                          ^ _given
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        self._start = 0
        self._given = 0
        self._num_chars = 0  # of the text from _start on, how much was given out

    def add(self, token_id: int) -> str:
        """The text that became certain with this token; often empty."""
        self._tokens.append(token_id)
        text = self._decode(self._tokens[self._start :])
        if text.endswith(UNFINISHED):
            return self._give(text[: -len(UNFINISHED)])
        piece = self._give(text)
        if piece:
            self._start, self._given = self._given, len(self._tokens)
            self._num_chars = len(self._decode(self._tokens[self._start :]))
        return piece

    def flush(self) -> str:
        """What is left when no token follows."""
        return self._give(self._decode(self._tokens[self._start :]))

    def _give(self, text: str) -> str:
        piece = text[self._num_chars :]
        self._num_chars = max(self._num_chars, len(text))
        return piece
