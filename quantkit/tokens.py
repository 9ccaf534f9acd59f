"""Text as token ids: one long stream, kept on disk, and the windows read from it.

All documents are joined by blank lines and tokenized without special tokens. Text of any size is tokenized
piece by piece, with the ids that tokenizing it at once would give; the ids go to an unnamed temporary file,
so memory does not grow with the text.
"""

import hashlib
import json
import tempfile
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from quantkit.errors import SourceError, TextError, first_line

SEPARATOR = "\n\n"
PIECE_CHARS = 1 << 20
OVERLAP_CHARS = 4096  # a token's choice depends on text near it, hardly ever on text this far away


class Encoded(NamedTuple):
    """Token ids of a string, and the character at which each starts."""

    ids: list[int]
    starts: list[int]


class Tokenizer:
    """A checkpoint's tokenizer, without special tokens."""

    def __init__(self, path: Path, backend: Any) -> None:
        self.path = path
        self.backend = backend

    def encode(self, text: str) -> Encoded:
        """Ids of one string and where each token starts."""
        encoded = self.backend(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return Encoded(encoded["input_ids"], [start for start, _ in encoded["offset_mapping"]])

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of some ids; what is no whole character becomes U+FFFD."""
        return str(self.backend.decode(token_ids, clean_up_tokenization_spaces=False))

    def vocabulary(self) -> dict[str, int]:
        """Token -> id, added tokens included."""
        return dict(self.backend.get_vocab())


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder, through transformers; code of the checkpoint is never run.

    Raises SourceError if the folder holds none that can be read.
    """
    from transformers import AutoTokenizer

    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
    if not any((path / name).is_file() for name in names):
        raise SourceError(
            f"{path}: no tokenizer", fix="copy the tokenizer files of the original into this folder"
        )
    try:
        backend = AutoTokenizer.from_pretrained(
            path, config=_config_of(path), trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # of a damaged file, tokenizers raises nothing narrower
        raise SourceError(
            f"{path}: its tokenizer cannot be loaded ({first_line(error)})",
            fix="fetch the tokenizer files again",
        ) from error
    if not backend.is_fast:
        raise SourceError(
            f"{path}: its tokenizer has no tokenizer.json form", fix="add a tokenizer.json to the folder"
        )
    return Tokenizer(path, backend)


def _config_of(path: Path) -> Any:
    """What transformers chooses the tokenizer's class by; None: it needs the model's whole configuration.

    That of a model's family imports half of transformers and torch's compiler: two to three seconds.
    """
    from transformers import PreTrainedConfig

    declared = _object_in(path / "tokenizer_config.json")
    if "tokenizer_class" not in declared or "auto_map" in declared:
        return None
    own = _object_in(path / "config.json")
    known = {name: own[name] for name in ("model_type", "model_name", "tokenizer_class") if name in own}
    return PreTrainedConfig(name_or_path=str(path), **known)


def _object_in(file: Path) -> dict[str, Any]:
    """The JSON object in a file; nothing where there is none, which transformers has to say."""
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class TokenStream:
    """Token ids on disk, in order: `len`, `read`, and the hash of the text they came from.

    Holds one open temporary file, which disappears when this is closed; use it in a `with`.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the stream)
        self._text_digest = hashlib.sha256()
        self._count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop the file."""
        self._file.close()

    def __len__(self) -> int:
        return self._count

    @property
    def text_hash(self) -> str:
        """SHA-256 of the joined text, UTF-8."""
        return self._text_digest.hexdigest()

    def add_text(self, text: str) -> None:
        """Count text into the hash."""
        self._text_digest.update(text.encode())

    def add_ids(self, ids: list[int]) -> None:
        """Append token ids."""
        self._file.seek(0, 2)
        self._file.write(np.asarray(ids, dtype=np.int32).tobytes())
        self._count += len(ids)

    def read(self, start: int, length: int) -> Tensor:
        """Ids [start, start + length), int64."""
        self._file.seek(4 * start)
        ids = np.frombuffer(self._file.read(4 * length), dtype=np.int32)
        assert ids.size == length, "the range lies inside the stream"
        return torch.from_numpy(ids.astype(np.int64))


def tokenize(documents: Iterable[str], tokenizer: Tokenizer, piece_chars: int = PIECE_CHARS) -> TokenStream:
    """Token ids of all documents joined by blank lines, exactly as if tokenized in one piece.

    piece_chars: characters tokenized at a time, well above OVERLAP_CHARS; sets the peak memory. Raises
    TextError as the documents do.
    """
    stream = TokenStream()
    try:
        _fill(stream, documents, tokenizer, piece_chars)
    except BaseException:
        stream.close()
        raise
    return stream


def _fill(stream: TokenStream, documents: Iterable[str], tokenizer: Tokenizer, piece_chars: int) -> None:
    text, skip, enough = "", 0, piece_chars
    for part in _parts(documents, piece_chars):
        stream.add_text(part)
        text += part
        if len(text) >= enough:
            settled = _settle(text, skip, tokenizer)
            if settled is None:
                enough = 2 * len(text)
                continue
            stream.add_ids(settled.ids)
            text, skip, enough = text[-OVERLAP_CHARS:], settled.skip, piece_chars
    encoded = tokenizer.encode(text)
    stream.add_ids(encoded.ids[_first_from(encoded, skip) :])


def _parts(documents: Iterable[str], max_chars: int) -> Iterator[str]:
    """Slices whose concatenation is the documents joined by blank lines."""
    separator = ""
    for document in documents:
        joined = separator + document
        separator = SEPARATOR
        for start in range(0, len(joined), max_chars):
            yield joined[start : start + max_chars]


class _Settled(NamedTuple):
    """Ids that no later text can change; the last OVERLAP_CHARS are tokenized again, their first `skip` dropped."""

    ids: list[int]
    skip: int


def _settle(text: str, skip: int, tokenizer: Tokenizer) -> _Settled | None:
    """Ids of text from character `skip` to a place near its end where the cut does no harm; None if there is none.

        text     |--skip--|=========== ids ===========|..........|
        overlap                            |....zone: equal?.....|      OVERLAP_CHARS

    Tokenized as the end of this piece and as the start of the next one, the middle of the overlap must give
    the same tokens at the same places: then neither edge is felt there.
    """
    whole = tokenizer.encode(text)
    base = len(text) - OVERLAP_CHARS
    again = tokenizer.encode(text[base:])
    margin = OVERLAP_CHARS // 4
    first, last = _first_from(whole, base + margin), _first_from(whole, len(text) - margin)
    other_first, other_last = _first_from(again, margin), _first_from(again, OVERLAP_CHARS - margin)
    same_ids = whole.ids[first:last] == again.ids[other_first:other_last]
    same_places = whole.starts[first:last] == [base + start for start in again.starts[other_first:other_last]]
    if first == last or not same_ids or not same_places:
        return None
    return _Settled(whole.ids[_first_from(whole, skip) : first], whole.starts[first] - base)


def _first_from(encoded: Encoded, position: int) -> int:
    """Index of the first token that starts at or after `position`; starts never decrease."""
    return bisect_left(encoded.starts, position)


def window_starts(num_tokens: int, count: int, length: int) -> list[int]:
    """Where `count` windows of `length` tokens start, spread evenly: window i at i · ⌊num_tokens / count⌋.

    They never overlap. Raises TextError, with both numbers, if the text is too short for that.
    """
    if num_tokens < count * length:
        fits = num_tokens // length
        less = f"--windows {fits}" if fits else f"a --length up to {num_tokens}"
        raise TextError(
            f"the text has {num_tokens} tokens, and {count} windows of {length} need {count * length}",
            fix=f"give more text, or {less}",
        )
    return [index * (num_tokens // count) for index in range(count)]


def read_windows(stream: TokenStream, count: int, length: int) -> Iterator[Tensor]:
    """`count` windows of `length` token ids (int64), spread evenly over the text, read as they are asked for."""
    for start in window_starts(len(stream), count, length):
        yield stream.read(start, length)
