"""Pieces of Python's documentation that probes are cut from: paragraphs, sentences, words, examples of code.

Only the half of the documentation that models are judged by, never the half that they are calibrated on.
"""

import re
import textwrap
from functools import cache
from random import Random

from quantkit.text import DOCS, load_documents

MIN_WORDS = 25
MIN_LETTERS = 0.88  # of a paragraph's characters, spaces counted
MIN_CODE_CHARS = 120

_SENTENCE_END = re.compile(r"(?<=[.?!]) (?=[A-Z])")
_WORD = re.compile(r"(?<= )[a-z]{5,10}\b")
_CODE = re.compile(r"(>>> |(async )?(def|for|while|with|class|try|if)\b.*:$|(import|from) \w+)", re.MULTILINE)


@cache
def paragraphs() -> tuple[str, ...]:
    """Paragraphs of prose, each on one line, in an order that has nothing to do with their topics."""
    calibration = " ".join(" ".join(load_documents(DOCS, use="calibrate")).split())
    texts = dict.fromkeys(" ".join(block.split()) for block in _blocks())
    # topics share paragraphs
    unique = [text for text in texts if _is_prose(text) and text not in calibration]
    Random(DOCS).shuffle(unique)
    return tuple(unique)


@cache
def sentences() -> tuple[str, ...]:
    """All sentences of all paragraphs, each once."""
    found = (sentence for paragraph in paragraphs() for sentence in split_sentences(paragraph))
    return tuple(dict.fromkeys(found))


@cache
def words() -> tuple[str, ...]:
    """Every lower-case word of 5 to 10 letters that the paragraphs have, once, sorted."""
    return tuple(sorted({word for paragraph in paragraphs() for word in _WORD.findall(paragraph)}))


@cache
def code() -> tuple[str, ...]:
    """Examples of Python code: sessions of the interpreter and definitions."""
    indented = (textwrap.dedent(block) for block in _blocks() if block.startswith("   "))
    found = [block for block in indented if len(block) >= MIN_CODE_CHARS and _CODE.match(block)]
    Random(DOCS).shuffle(found)
    return tuple(found)


def split_sentences(paragraph: str) -> list[str]:
    """At a full stop, question or exclamation mark before a capital."""
    return _SENTENCE_END.split(paragraph)


def gaps(paragraph: str) -> list[re.Match[str]]:
    """The words of `words()` that the paragraph has exactly once."""
    found = list(_WORD.finditer(paragraph))
    times = [match.group() for match in found]
    return [match for match in found if times.count(match.group()) == 1]


@cache
def _blocks() -> tuple[str, ...]:
    """What lies between blank lines."""
    return tuple(block for document in load_documents(DOCS) for block in re.split(r"\n\s*\n", document))


def _is_prose(text: str) -> bool:
    letters = sum(char.isalpha() or char == " " for char in text)
    return (
        re.match(r"[A-Z“]", text) is not None
        and text.endswith(".")
        and len(text.split()) >= MIN_WORDS
        and letters >= MIN_LETTERS * len(text)
        and not re.search(r">>>|::=|\||\.\.\. ", text)
    )
