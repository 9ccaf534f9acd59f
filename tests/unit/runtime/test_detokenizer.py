"""Text that grows by whole characters, from tokenizers of both kinds: bytes as letters, and bytes as a fallback."""

import random
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models
from transformers import PreTrainedTokenizerFast

from quantkit.runtime.tokenizer import Tokenizer

shared_fixture = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def tokenizer(byte_tokenizer, tmp_path):
    return Tokenizer(tmp_path, byte_tokenizer)


@pytest.fixture
def fallback(tmp_path):
    """As Llama 2's: pieces with ▁ for spaces, one token for each byte of what has no piece."""
    pieces = ["<s>", "▁", "▁a", "b", "▁bc", "é", "€", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    backend = Backend(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(["<s>"])
    return Tokenizer(tmp_path, PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>"))


def pieces_of(tokenizer, ids, **named):
    detokenizer = tokenizer.detokenizer(**named)
    return [detokenizer.add(token) for token in ids] + [detokenizer.flush()]


def letters():
    """The printable letter that stands for each byte in byte-level BPE."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + place) for place, byte in enumerate(others)
    }


@shared_fixture
@given(text=st.text(max_size=30))
def test_pieces_are_whole_characters_and_join_to_the_text(text, tokenizer):
    ids = tokenizer.backend(text, add_special_tokens=False)["input_ids"]
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids) == text
    if "�" not in text:
        assert not any("�" in piece for piece in pieces)


@shared_fixture
@given(bytes_=st.binary(max_size=30))
def test_broken_bytes_come_out_as_decoding_them_at_once(bytes_, tokenizer):
    ids = [tokenizer.backend.convert_tokens_to_ids(letters()[byte]) for byte in bytes_]
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids) == bytes_.decode(errors="replace")


@shared_fixture
@given(
    parts=st.lists(st.sampled_from(["▁", "▁a", "b", "▁bc", "é", "€", "😀", "中", "<s>"]), max_size=20),
    skips=st.booleans(),
)
def test_bytes_as_a_fallback_join_to_the_text(parts, skips, fallback):
    """😀 and 中 are four and three tokens."""
    pieces = [[part] if len(part) > 1 or part in "▁b€é" else _byte_pieces(part) for part in parts]
    ids = [fallback.backend.convert_tokens_to_ids(piece) for each in pieces for piece in each]
    got = pieces_of(fallback, ids, skip_special_tokens=skips)
    assert "".join(got) == fallback.decode(ids, skip_special_tokens=skips)
    assert not any("�" in piece for piece in got)


def _byte_pieces(character):
    return [f"<0x{byte:02X}>" for byte in character.encode()]


@shared_fixture
@given(seed=st.integers(0, 10**6))
def test_special_tokens_anywhere_do_no_harm(seed, tokenizer):
    chance = random.Random(seed)
    ids = tokenizer.backend("a€b😀 中c", add_special_tokens=False)["input_ids"]
    mixed = [token for each in ids for token in [*[chance.randrange(4)] * chance.randrange(60), each]]
    assert "".join(pieces_of(tokenizer, mixed)) == "a€b😀 中c"
    shown = [token for each in ids for token in (each, 1)]
    text = "".join(pieces_of(tokenizer, shown, skip_special_tokens=False))
    assert text == tokenizer.decode(shown, skip_special_tokens=False)


def test_text_comes_as_soon_as_its_last_byte(tokenizer):
    ids = tokenizer.backend("a€b", add_special_tokens=False)["input_ids"]
    assert pieces_of(tokenizer, ids) == ["a", "", "", "€", "b", ""]


def test_certain_text_does_not_wait_for_the_character_after_it(tokenizer):
    """A token that ends one character and begins the next."""
    backend = Backend(models.BPE(vocab={"aâ": 0, "Ĥ¬": 1, "câ": 2}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    tokens = Tokenizer(tokenizer.path, PreTrainedTokenizerFast(tokenizer_object=backend))
    assert pieces_of(tokens, [0, 1, 2, 1]) == ["a", "€", "c", "€", ""]


def test_characters_that_no_token_ends_with_are_not_split(tokenizer):
    """Every token ends within a character, for longer than is looked at together."""
    backend = Backend(models.BPE(vocab={"â": 0, "Ĥ¬â": 1, "Ĥ¬": 2}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    tokens = Tokenizer(tokenizer.path, PreTrainedTokenizerFast(tokenizer_object=backend))
    pieces = pieces_of(tokens, [0, *[1] * 200, 2])
    assert pieces == ["", *["€"] * 201, ""]


@pytest.mark.parametrize("kind", ["text", "special", "broken"])
def test_a_token_costs_as_much_after_many_as_after_few(kind, tokenizer):
    text = tokenizer.backend("a€b", add_special_tokens=False)["input_ids"]
    ids = {"text": text, "special": [2], "broken": text[3:4]}[kind] * 6000
    detokenizer, times = tokenizer.detokenizer(), []
    for start in range(0, 6000, 1000):
        before = time.process_time()
        for token in ids[start : start + 1000]:
            detokenizer.add(token)
        times.append(time.process_time() - before)
    assert min(times[3:]) < 3 * min(times[:3])
