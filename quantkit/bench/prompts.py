"""What is asked in a benchmark: random tokens, random words, or the lines of a file."""

import random
from pathlib import Path

from quantkit.errors import BenchError

# one token each, with the blank before it, in the vocabularies of today
WORDS = (
    "the of and to in is that for it as was with be by on not he this are or his from at which but have an had they "
    "you were their one all we can her has there been if more when will would who so no out up said what its about"
)


def random_prompts(num_requests: int, num_tokens: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Prompts of random tokens, no two alike."""
    numbers = random.Random(seed)
    return [[numbers.randrange(vocab_size) for _ in range(num_tokens)] for _ in range(num_requests)]


def random_texts(num_requests: int, num_words: int, seed: int = 0) -> list[str]:
    """Prompts of random words, each about a token."""
    numbers, words = random.Random(seed), WORDS.split()
    return [" ".join(numbers.choices(words, k=num_words)) for _ in range(num_requests)]


def prompts_of_file(path: Path, count: int) -> list[str]:
    """So many lines of a file, in turn. Raises BenchError if it has none, or cannot be read."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"{path}: cannot be read ({error})", fix="give a text file in UTF-8") from None
    if not lines:
        raise BenchError(f"{path}: no prompts", fix="write a prompt on each line")
    return [lines[number % len(lines)] for number in range(count)]
