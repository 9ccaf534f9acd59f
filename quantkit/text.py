"""Text by SPEC: a file or folder, a hub dataset, or the documentation that ships with Python, as documents.

Documents are streamed, so a text of any size costs no memory. What a token is, is `tokens.py`'s business.

SPEC is one of
    PATH                         .txt (documents end at blank lines), .jsonl, .parquet, or a folder of those
    hf:DATASET[/CONFIG][:SPLIT]  a dataset on the Hugging Face hub; DATASET is OWNER/NAME or NAME
    docs                         the language reference of the running Python: every other topic to calibrate on, the
                                 rest to judge by, so that nothing is judged by what it was calibrated on

`self`, text that the model writes, is calibration's: no document has been written yet.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from quantkit.errors import TextError, first_line

DOCS = "docs"
SELF = "self"
HUB_PREFIX = "hf:"
SUFFIXES = (".txt", ".jsonl", ".parquet")
DEFAULT_SPLIT = "train"

_SPEC_FIX = (
    f"give a {', '.join(SUFFIXES)} file, a folder of those, `hf:OWNER/NAME[/CONFIG][:SPLIT]`, or `docs`"
)
_ROW_FIX = 'each row needs a string "text", or "messages": [{"role": …, "content": …}, …]'

Message = dict[str, Any]
Render = Callable[[list[Message], str], str]  # a conversation, and its place for errors -> its text


def contents(messages: list[Message], place: str) -> str:
    """A conversation without its roles: what was said, one after another."""
    return "\n\n".join(message["content"] for message in messages)


@dataclass(frozen=True, slots=True)
class Documents:
    """The documents of one SPEC, in a fixed order; every iteration reads them again from the start."""

    spec: str
    read: Callable[[], Iterable[str]]

    def __iter__(self) -> Iterator[str]:
        """Yield documents that hold more than blanks. Raises TextError where the text is unreadable or none."""
        is_empty = True
        for text in self.read():
            if text.strip():
                is_empty = False
                yield text
        if is_empty:
            raise TextError(f"{self.spec}: holds no text", fix="give a text that is not empty")


def load_documents(
    spec: str, render: Render = contents, *, use: Literal["judge", "calibrate"] = "judge"
) -> Documents:
    """The documents that SPEC names; nothing but file names is read before iterating.

    render: makes a document of a conversation, whose messages have a role, a content that is a string, and what
    else the data gives them. use: what for; decides which half of `docs` it is. Raises TextError for a SPEC that
    names nothing readable.
    """
    if spec == DOCS:
        return Documents(spec, lambda: _read_docs(use))
    if spec == SELF:
        raise TextError(
            f"{SELF}: text that the model writes is for calibration only",
            fix=f"{_SPEC_FIX}; for a file of that name, ./{SELF}",
        )
    if spec.startswith(HUB_PREFIX):
        name, config, split = _parse_hub(spec)
        return Documents(spec, lambda: _read_hub(spec, name, config, split, render))
    files = _files(spec)
    return Documents(spec, lambda: (text for file in files for text in _READERS[file.suffix](file, render)))


def _files(spec: str) -> list[Path]:
    if not spec:
        raise TextError("the name of the text is empty", fix=_SPEC_FIX)
    try:
        path = Path(spec).expanduser()
    except RuntimeError:
        raise TextError(f"{spec}: there is no such user", fix=_SPEC_FIX) from None
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
        if not files:
            raise TextError(f"{spec}: no {', '.join(SUFFIXES)} file in this folder", fix=_SPEC_FIX)
        return files
    if not path.exists():
        raise TextError(f"{spec}: no such file or folder", fix=_SPEC_FIX)
    if path.suffix not in SUFFIXES:
        found = f"is of kind {path.suffix}" if path.suffix else "has no suffix that says what it is"
        raise TextError(f"{spec}: {found}, which cannot be read", fix=_SPEC_FIX)
    return [path]


def _read_txt(path: Path, render: Render) -> Iterator[str]:
    """Paragraph blocks: lines up to the next blank one."""
    block: list[str] = []
    for line in _lines(path):
        if line.strip():
            block.append(line)
        elif block:
            yield "".join(block).removesuffix("\n")
            block = []
    if block:
        yield "".join(block).removesuffix("\n")


def _read_jsonl(path: Path, render: Render) -> Iterator[str]:
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            place = f"{path}:{number}"
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                fix = "write one JSON object per line"
                raise TextError(f"{place}: not valid JSON ({error})", fix=fix) from None
            yield _row_text(row, place, render)


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from file
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise TextError(
            f"{path}: not UTF-8 text (byte 0x{byte:02x} does not fit)",
            fix=f"convert it: iconv -f ISO-8859-1 -t UTF-8 {path.name} > utf8-{path.name}",
        ) from None


def _read_parquet(path: Path, render: Render) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            columns = [name for name in ("text", "messages") if name in file.schema_arrow.names][:1]
            if not columns:
                found = ", ".join(file.schema_arrow.names)
                raise TextError(f"{path}: no column named text or messages, only {found}", fix=_ROW_FIX)
            first_row = 0
            for batch in file.iter_batches(batch_size=256, columns=columns):
                for index, row in enumerate(batch.to_pylist(), start=first_row):
                    yield _row_text(row, f"{path}: row {index}", render)
                first_row += batch.num_rows
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError, OSError) as error:
        raise TextError(
            f"{path}: not readable as parquet ({first_line(error)})", fix="write the file again"
        ) from None


_READERS: dict[str, Callable[[Path, Render], Iterator[str]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _parse_hub(spec: str) -> tuple[str, str | None, str]:
    path, _, split = spec.removeprefix(HUB_PREFIX).partition(":")
    parts = path.split("/")
    if not all(parts) or len(parts) > 3 or (":" in spec.removeprefix(HUB_PREFIX) and not split):
        raise TextError(
            f"{spec}: not a dataset", fix="write hf:OWNER/NAME, hf:OWNER/NAME/CONFIG or …:SPLIT after it"
        )
    config = parts[2] if len(parts) == 3 else None
    return "/".join(parts[:2]), config, split or DEFAULT_SPLIT


def _read_hub(spec: str, name: str, config: str | None, split: str, render: Render) -> Iterator[str]:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
        yield from row_texts(rows, spec, render)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:  # its own, and its HTTP client's
        fix = (
            "check owner, name, config and split on the hub, and the connection; private data needs HF_TOKEN"
        )
        raise TextError(f"{spec}: cannot be loaded ({first_line(error)})", fix=fix) from error


def row_texts(rows: Iterable[Any], place: str, render: Render = contents) -> Iterator[str]:
    """The text of each row of a dataset. Raises TextError naming the row that has none."""
    for index, row in enumerate(rows):
        yield _row_text(row, f"{place}: row {index}", render)


def _row_text(row: Any, place: str, render: Render) -> str:
    """`text` of a row, "" where it is null, or its rendered `messages`."""
    if not isinstance(row, dict):
        raise TextError(f"{place}: not an object but {type(row).__name__}", fix=_ROW_FIX)
    if "text" in row:
        text = row["text"] or ""
    elif isinstance(row.get("messages"), list):
        text = render([_message(message, place) for message in row["messages"]], place)
    else:
        raise TextError(
            f"{place}: neither text nor messages, only {', '.join(row) or 'nothing'}", fix=_ROW_FIX
        )
    if not isinstance(text, str):
        raise TextError(f"{place}: text is not a string but {type(text).__name__}", fix=_ROW_FIX)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TextError(
            f"{place}: not a valid string ({error.reason})", fix="write the row again as UTF-8"
        ) from None
    return text


def _message(message: Any, place: str) -> Message:
    """A message whose content is a string, without the keys that are null (as columns of a table are).

    On disk it may be null (a tool call), or a list of parts of which some are text.
    """
    content = message.get("content", "") if isinstance(message, dict) and "role" in message else 0
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        content = "\n\n".join(part["text"] for part in content if isinstance(part.get("text"), str))
    if content is not None and not isinstance(content, str):
        raise TextError(f"{place}: a message is not of the form {{role, content}}", fix=_ROW_FIX)
    return {key: value for key, value in message.items() if value is not None} | {"content": content or ""}


def _read_docs(use: str) -> Iterable[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        problem = f"{DOCS}: this Python was installed without its documentation (pydoc_data.topics)"
        raise TextError(problem, fix="give a file with text: --data FILE.txt") from None
    texts = list(dict.fromkeys(text.strip() for _, text in sorted(topics.items())))
    return texts[0 if use == "calibrate" else 1 :: 2]
