"""Probes of language: the missing word, the sentence that follows, and openings to write on from."""

from functools import cache
from random import Random
from typing import Any

from quantkit.evaluation.probes import corpus
from quantkit.evaluation.probes.choice import choice_item

MIN_GAPS = 4  # words that a paragraph lets be left out
SENTENCE_CHARS = range(40, 240)  # enough sentences are about as long
NUM_SIMILAR = 12


def cloze(rng: Random, index: int, *, words_after: int) -> dict[str, Any]:
    """A paragraph with a word to choose, judged with the `words_after` words behind it.

    The wrong words have its number of letters, give or take one, and are not in the paragraph.
    """
    paragraph = _with_gaps()[index % len(_with_gaps())]
    gap = rng.choice(corpus.gaps(paragraph)[MIN_GAPS // 2 :])  # some text has to come first
    word, rest = gap.group(), " ".join(paragraph[gap.end() :].split(" ")[: words_after + 1])
    others = [
        other for other in corpus.words() if abs(len(other) - len(word)) <= 1 and other not in paragraph
    ]
    choices = [f" {other}{rest}" for other in (word, *rng.sample(others, 3))]
    return choice_item(rng, paragraph[: gap.start()].rstrip(), choices)


def continuation(rng: Random, index: int) -> dict[str, Any]:
    """The beginning of a paragraph and its next sentence, among sentences of like length from elsewhere."""
    before, right = _followed()[index % len(_followed())]
    elsewhere = (other for other in corpus.sentences() if other not in before and other != right)
    similar = sorted(elsewhere, key=lambda other: abs(len(other) - len(right)))[:NUM_SIMILAR]
    return choice_item(rng, before, [f" {sentence}" for sentence in (right, *rng.sample(similar, 3))])


def opening(rng: Random, index: int, *, words: int = 24) -> dict[str, Any]:
    """The first words of a paragraph."""
    paragraph = corpus.paragraphs()[index % len(corpus.paragraphs())]
    return {"prompt": " ".join(paragraph.split()[:words]), "target": ""}


@cache
def _with_gaps() -> list[str]:
    return [text for text in corpus.paragraphs() if len(corpus.gaps(text)) >= MIN_GAPS]


@cache
def _followed() -> list[tuple[str, str]]:
    """Beginnings of paragraphs, and the sentence that comes next: once for each paragraph that has one."""
    found: dict[str, tuple[str, str]] = {}
    for paragraph in corpus.paragraphs():
        sentences = corpus.split_sentences(paragraph)
        for place, sentence in enumerate(sentences):
            if place and len(sentence) in SENTENCE_CHARS:
                found.setdefault(paragraph, (" ".join(sentences[:place]), sentence))
    return list(found.values())
