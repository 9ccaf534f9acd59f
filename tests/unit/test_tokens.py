"""Token ids do not depend on how text is cut into pieces, and windows lie where they are said to."""

import itertools
import json
import random
import sys
import tracemalloc

import pytest
from transformers import AutoTokenizer

from quantkit.errors import SourceError, TextError
from quantkit.formats.demo import demo_checkpoint
from quantkit.tokens import Encoded, TokenStream, load_tokenizer, read_windows, tokenize, window_starts
from tests.command_line import finish
from tests.tiny_llama import byte_level_tokenizer, write_tokenizer


class RustTokenizer:
    """The `tokenizers` library without transformers around it."""

    def __init__(self):
        self.backend = byte_level_tokenizer()

    def encode(self, text):
        encoding = self.backend.encode(text, add_special_tokens=False)
        return Encoded(encoding.ids, [start for start, _ in encoding.offsets])


class CharTokenizer:
    """A token per character, and how much text it was given at most."""

    longest = 0

    def encode(self, text):
        self.longest = max(self.longest, len(text))
        return Encoded([ord(char) for char in text], list(range(len(text))))


class TripleTokenizer:
    """Three characters a token, counted from the start: no place is free of where the text began."""

    def encode(self, text):
        starts = list(range(0, len(text), 3))
        return Encoded([sum(map(ord, text[start : start + 3])) for start in starts], starts)


@pytest.fixture(scope="module")
def tokenizer():
    return RustTokenizer()


def random_text(length, seed):
    words = [
        "the",
        " quick",
        "fox",
        " dogs",
        "\n",
        "\n\n",
        "   ",
        "\t",
        "é",
        "日本語",
        "🙂",
        "👩‍👩‍👧",
        "3.14",
        ";",
        "mind?",
    ]
    draw = random.Random(seed)
    return "".join(draw.choice(words) for _ in range(length))


@pytest.mark.parametrize("piece_chars", [4097, 6000, 10_000])
@pytest.mark.parametrize("seed", [0, 1])
def test_pieces_give_the_ids_of_the_whole(tokenizer, piece_chars, seed):
    documents = [random_text(length, seed + length) for length in (9000, 3, 1, 5000, 20)]
    with tokenize(documents, tokenizer, piece_chars) as stream:
        assert stream.read(0, len(stream)).tolist() == tokenizer.encode("\n\n".join(documents)).ids


@pytest.mark.parametrize("documents", [["a" * 30_000], [" " * 30_000, "b"], ["ab" * 9000 + " x" * 9000]])
def test_text_with_nowhere_to_cut_is_taken_in_larger_pieces(tokenizer, documents):
    with tokenize(documents, tokenizer, 8192) as stream:
        assert stream.read(0, len(stream)).tolist() == tokenizer.encode("\n\n".join(documents)).ids


def test_a_place_where_the_pieces_disagree_is_never_cut():
    text = random_text(20_000, 0)
    for piece_chars in (5000, 8192, 9001):
        with tokenize([text], TripleTokenizer(), piece_chars) as stream:
            assert stream.read(0, len(stream)).tolist() == TripleTokenizer().encode(text).ids


def test_memory_does_not_grow_with_the_text():
    def documents():
        for _ in range(150):
            yield "x" * 10_000

    tokenizer = CharTokenizer()
    tracemalloc.start()
    with tokenize(documents(), tokenizer, 20_000) as stream:
        peak = tracemalloc.get_traced_memory()[1]
        assert len(stream) == 150 * 10_000 + 149 * 2
    tracemalloc.stop()
    assert tokenizer.longest < 60_000
    assert peak < 5_000_000  # the ids alone are 6 MB, as int32


def test_text_hash_is_of_the_joined_text_however_it_is_cut():
    hashes = set()
    for documents, piece_chars in ((["ab", "cd"], 8192), (["ab\n\ncd"], 8192), (["ab", "cd"], 4100)):
        with tokenize(documents, CharTokenizer(), piece_chars) as stream:
            hashes.add(stream.text_hash)
    assert len(hashes) == 1


def test_windows_lie_where_they_are_said_to():
    assert window_starts(100, 3, 20) == [0, 33, 66]
    assert window_starts(48, 24, 2) == [2 * i for i in range(24)]
    with TokenStream() as stream:
        stream.add_ids(list(range(100)))
        windows = [window.tolist() for window in read_windows(stream, 3, 20)]
    assert windows == [list(range(start, start + 20)) for start in (0, 33, 66)]


@pytest.mark.parametrize("num_tokens", [60, 61, 83, 1000])
def test_windows_never_overlap_and_stay_inside(num_tokens):
    starts = window_starts(num_tokens, 3, 20)
    assert all(later - earlier >= 20 for earlier, later in itertools.pairwise(starts))
    assert starts[-1] + 20 <= num_tokens


def test_too_short_a_text_says_what_was_found_and_needed():
    with pytest.raises(TextError) as caught:
        window_starts(59, 3, 20)
    assert "59 tokens" in caught.value.problem and "need 60" in caught.value.problem
    assert "--windows 2" in caught.value.fix
    with pytest.raises(TextError) as caught:
        window_starts(19, 3, 20)
    assert "--length up to 19" in caught.value.fix


def test_tokenizer_of_a_folder(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    text = "The quick brown fox 🙂"
    assert tokenizer.encode(text) == RustTokenizer().encode(text)
    assert len(tokenizer.vocabulary()) > 256


def test_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(SourceError, match="no tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["{", "{}", '{"model": {"type": "none of them"}}', ""])
def test_damaged_tokenizer(tmp_path, content):
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(SourceError, match="cannot be loaded"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("family", [None, "llama", "qwen2", "qwen3_moe", "gemma3_text", "mistral", "phi3"])
@pytest.mark.parametrize("name", [None, "PreTrainedTokenizerFast", "LlamaTokenizerFast", "Qwen2Tokenizer"])
def test_the_tokenizer_is_the_one_that_transformers_chooses_by_the_whole_configuration(
    tmp_path, family, name
):
    write_tokenizer(tmp_path)
    settings = {"bos_token": "<s>", "eos_token": "</s>"} | ({} if name is None else {"tokenizer_class": name})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    if family is not None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    found = load_tokenizer(tmp_path).backend
    expected = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert type(found) is type(expected)
    assert found.backend_tokenizer.to_str() == expected.backend_tokenizer.to_str()
    assert (found.eos_token_id, found.bos_token_id) == (expected.eos_token_id, expected.bos_token_id)
    assert found.chat_template == expected.chat_template


def test_a_tokenizer_brings_neither_models_nor_a_compiler():
    code = "import sys; from pathlib import Path; from quantkit.tokens import load_tokenizer; "
    code += "load_tokenizer(Path(sys.argv[1])); sys.exit('torch._dynamo' in sys.modules)"
    finished = finish([sys.executable, "-c", code, str(demo_checkpoint())])
    assert finished.returncode == 0, finished.stderr
