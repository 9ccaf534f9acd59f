"""Answers of one model to one task on disk, a line each as it arrives: what a run continues from.

    {"request": hash of what was asked, "item": 17, "answer": [-3.25, true]}

A line that a kill cut off is dropped, and so is one that holds no answer of its kind. What the answers
depend on besides the request is in the file's path.
"""

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from quantkit.errors import OutputError


class SampleLog:
    """Open for appending; use it in a `with`. Answers are what JSON makes of lm-eval's: lists for tuples.

    on_answer: told how many of those missing are written. Raises OutputError if the file cannot be read or written.
    """

    def __init__(self, file: Path, on_answer: Callable[[int, int], None] = lambda done, total: None) -> None:
        self.file = file
        self._on_answer = on_answer
        self._items: dict[str, Any] = {}  # of what is asked now, by request
        self._answers: dict[str, list[Any]] = defaultdict(list)
        self._num_written = self._num_missing = 0

    def __enter__(self) -> Self:
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self._stream = self.file.open("ab+")
            self._read()
        except OSError as error:
            raise _cannot("opened", self.file, error) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def missing(self, kind: str, requests: Sequence[Any]) -> list[Any]:
        """Those of lm-eval's requests to be asked: one of several that are the same, unless answers are drawn.

        Of drawn ones all are asked again if one is missing: which were answered, nobody knows.
        """
        keys = [request_key(kind, request.args) for request in requests]
        for key in set(keys):
            self._answers[key] = [answer for answer in self._answers[key] if _fits(kind, answer)]
        needed = dict.fromkeys(keys, 1) if not _is_drawn(kind, requests) else Counter(keys)
        self._items = {key: request.doc_id for key, request in zip(keys, requests, strict=True)}
        wanted = []
        left = {key: count for key, count in needed.items() if len(self._answers[key]) < count}
        for key, request in zip(keys, requests, strict=True):
            if left.get(key):
                left[key] -= 1
                wanted.append(request)
        self._num_missing += len(wanted)
        return wanted

    def answers(self, kind: str, requests: Sequence[Any]) -> list[Any]:
        """One for each request, all of which have been asked."""
        is_drawn = _is_drawn(kind, requests)
        taken: Counter[str] = Counter()
        found = []
        for key in (request_key(kind, request.args) for request in requests):
            taken[key] += is_drawn
            found.append(self._answers[key][-max(1, taken[key])])
        return found

    def add_partial(self, kind: str, arguments: Sequence[Any], answer: Any) -> None:
        """Write an answer: the part of lm-eval's `CacheHook` that its models call."""
        key = request_key(kind, arguments)
        line = json.dumps({"request": key, "item": self._items[key], "answer": answer}) + "\n"
        try:
            self._stream.write(line.encode())
            self._stream.flush()
        except OSError as error:
            raise _cannot("written", self.file, error) from error
        self._answers[key].append(json.loads(line)["answer"])
        self._num_written += 1
        self._on_answer(self._num_written, self._num_missing)

    def _read(self) -> None:
        self._stream.seek(0)
        end = 0
        for line in self._stream:
            entry = _parsed(line)
            if entry is not None:
                self._answers[entry["request"]].append(entry["answer"])
            if line.endswith(b"\n"):
                end += len(line)
        self._stream.truncate(end)
        self._stream.seek(0, os.SEEK_END)


def request_key(kind: str, arguments: Sequence[Any]) -> str:
    """A hash of what was asked."""
    asked = json.dumps([kind, *arguments], sort_keys=True, default=str)
    return hashlib.sha256(asked.encode(errors="surrogatepass")).hexdigest()[:32]


def _is_drawn(kind: str, requests: Sequence[Any]) -> bool:
    """Whether the same request may get other answers: a task asks all of its requests with the same settings."""
    settings = requests[0].args[1] if kind == "generate_until" and requests else {}
    return bool(settings.get("do_sample")) or float(settings.get("temperature", 0)) > 0


def _fits(kind: str, answer: Any) -> bool:
    """Whether lm-eval can judge it: what is not so was never written here."""
    if kind == "generate_until":
        return isinstance(answer, str)
    if kind == "loglikelihood_rolling":
        return type(answer) is float
    return isinstance(answer, list) and list(map(type, answer)) == [float, bool]


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    is_entry = isinstance(entry, dict) and isinstance(entry.get("request"), str) and "answer" in entry
    return entry if is_entry else None


def _cannot(done: str, file: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{file}: the log of samples cannot be {done} ({error.strerror})",
        fix="name another folder with --samples",
    )
