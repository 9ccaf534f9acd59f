"""A checkpoint's tokenizer as generation needs it: prompts and conversations to ids, ids to text."""

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from quantkit import tokens
from quantkit.errors import GenerationError, SourceError
from quantkit.formats.checkpoint import Checkpoint, read_json
from quantkit.runtime.detokenizer import Detokenizer

PLAIN_KEYS = {"role", "content"}
MORE_KEYS = {"assistant": {"tool_calls"}, "tool": {"tool_call_id", "name"}}  # of messages, by role
BYTE_NAME = re.compile("<0x[0-9A-F]{2}>")


class Tokenizer:
    """Encodes and decodes with special tokens; `backend` is transformers' own object."""

    def __init__(self, path: Path, backend: Any) -> None:
        self.path = path
        self.backend = backend
        self._texts_of_one: dict[tuple[int, bool], str] = {}

    @property
    def has_chat_template(self) -> bool:
        """Whether a prompt is a message of a conversation, rather than the start of a text."""
        return bool(self.backend.chat_template)

    def encode_prompt(self, prompt: str, *, raw: bool) -> list[int]:
        """Token ids of a prompt: as the user's message in the chat template, or, if there is none or raw, as is."""
        _check_text(prompt, "the prompt")
        if raw or not self.has_chat_template:
            return self._checked(self.backend(prompt)["input_ids"])
        try:
            ids = self._render([{"role": "user", "content": prompt}], {})
        except Exception as error:  # a template may fail in any way that an expression can
            raise SourceError(
                f"{self.path}: its chat template fails ({error})",
                fix="repair the template, or send the prompt with --raw",
            ) from error
        return self._checked(ids)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        options: Mapping[str, bool] = MappingProxyType({}),
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[int]:
        """Token ids of a conversation, up to where the answer begins. messages: each with `role` and `content`.

        An assistant's may have `tool_calls`, a tool's a `tool_call_id` and a `name`, as transformers passes them on.
        options, tools: what the template is told besides; it does with it what it likes.
        The template is rendered in transformers' immutable sandbox. Raises GenerationError if there is no template, if
        messages are not what the class says, or not what the template takes.
        """
        if not self.has_chat_template:
            raise GenerationError(
                f"{self.path} has no chat template: a base model continues text, it does not answer messages",
                fix="send the text to be continued as a prompt, or use the model's instruct variant",
            )
        for message in messages:
            _check_message(message)
        if not messages:
            raise GenerationError("the conversation has no messages", fix="give at least one")
        try:
            ids = self._render([dict(message) for message in messages], options, tools)
        except Exception as error:  # as above; a template refuses conversations by raising, too
            raise GenerationError(
                f"{self.path}: its chat template does not take these messages ({error})",
                fix="give roles in the order that the template asks for",
            ) from error
        return self._checked(ids)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        text: str = self.backend.backend_tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def decode_one(self, token_id: int, *, skip_special_tokens: bool = True) -> str:
        """Text of a token alone, kept for the next time."""
        key = (token_id, skip_special_tokens)
        text = self._texts_of_one.get(key)
        if text is None:
            text = self._texts_of_one[key] = self.decode([token_id], skip_special_tokens=skip_special_tokens)
        return text

    def token_id(self, text: str) -> int | None:
        """The token whose name this text is, if there is one."""
        token_id: int | None = self.backend.backend_tokenizer.token_to_id(text)
        return token_id

    def bytes_of_one(self, token_id: int) -> bytes | None:
        """A token's bytes, as far as its name tells them: for tokens that are no whole characters."""
        name: str = self.backend.backend_tokenizer.id_to_token(token_id) or ""
        if BYTE_NAME.fullmatch(name):  # of tokenizers over characters, with bytes to fall back to
            return bytes([int(name[3:5], 16)])
        known = _bytes_by_letter()
        return bytes(known[letter] for letter in name) if name and set(name) <= known.keys() else None

    def detokenizer(self, *, skip_special_tokens: bool = True) -> Detokenizer:
        """For a new text."""
        decode_many = self.backend.backend_tokenizer.decode

        def decode(ids: list[int]) -> str:
            if len(ids) == 1:  # the context of most tokens
                return self.decode_one(ids[0], skip_special_tokens=skip_special_tokens)
            text: str = decode_many(ids, skip_special_tokens=skip_special_tokens)
            return text

        return Detokenizer(decode, skipped=self._special_ids if skip_special_tokens else frozenset())

    @functools.cached_property
    def _special_ids(self) -> frozenset[int]:
        added = self.backend.backend_tokenizer.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    def _render(
        self,
        messages: list[dict[str, Any]],
        options: Mapping[str, bool],
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[int]:
        ids: list[int] = self.backend.apply_chat_template(
            messages, tools=list(tools) or None, add_generation_prompt=True, return_dict=False, **options
        )
        return ids

    def _checked(self, ids: list[int]) -> list[int]:
        if not ids:
            raise GenerationError("the prompt has no tokens", fix="give a prompt that is not empty")
        return list(ids)


@functools.cache
def _bytes_by_letter() -> dict[str, int]:
    """The letters that byte-level tokenizers write bytes with."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {letter: byte for byte, letter in bytes_to_unicode().items()}


def _check_message(message: Mapping[str, Any]) -> None:
    is_message = isinstance(message, Mapping) and all(isinstance(message.get(key), str) for key in PLAIN_KEYS)
    if not is_message or not set(message) <= PLAIN_KEYS | MORE_KEYS.get(message["role"], set()):
        raise GenerationError(
            "a message is not a role and a content, both strings", fix='give {"role": "user", "content": "…"}'
        )
    _check_text(message["role"] + message["content"], "a message")


def _check_text(text: str, name: str) -> None:
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise GenerationError(f"{name} is not UTF-8 text", fix="write it in UTF-8")


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder. Raises SourceError if it holds none that can be read."""
    return Tokenizer(path, tokens.load_tokenizer(path).backend)


def stop_tokens(checkpoint: Checkpoint, tokenizer: Tokenizer, *, vocab_size: int) -> frozenset[int]:
    """The tokens that end an answer: of generation_config.json (else config.json), and the tokenizer's own.

    Raises SourceError if a file names something that is no token of the model's: the answer would never end.
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
    wrong = next((each for each in ids if type(each) is not int or not 0 <= each < vocab_size), None)
    if wrong is not None:
        raise SourceError(
            f"{file}: eos_token_id {wrong!r} is no token of the model, which has {vocab_size}",
            fix="fetch this file again",
        )
    own = tokenizer.backend.eos_token_id
    return frozenset(ids if own is None else [*ids, own])
