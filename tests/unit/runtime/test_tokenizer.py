"""Prompts, stop tokens, and text that grows by whole characters."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantkit.errors import GenerationError, SourceError
from quantkit.formats.checkpoint import Checkpoint
from quantkit.runtime.tokenizer import Detokenizer, Tokenizer, load_tokenizer, stop_tokens
from tests.unit.runtime.conftest import TEMPLATE

shared_fixture = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def tokenizer(byte_tokenizer, tmp_path):
    return Tokenizer(tmp_path, byte_tokenizer)


@shared_fixture
@given(text=st.text(max_size=30))
def test_pieces_are_whole_characters_and_join_to_the_text(text, tokenizer):
    ids = tokenizer.backend(text, add_special_tokens=False)["input_ids"]
    detokenizer = Detokenizer(tokenizer.decode)
    pieces = [detokenizer.add(token) for token in ids]
    if "�" not in text:
        assert not any("�" in piece for piece in pieces)
    assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(ids)


@shared_fixture
@given(bytes_=st.binary(max_size=30))
def test_broken_bytes_come_out_as_decoding_them_at_once(bytes_, tokenizer):
    letters = {
        byte: tokenizer.backend.convert_tokens_to_ids(letter) for byte, letter in _byte_letters().items()
    }
    ids = [letters[byte] for byte in bytes_]
    detokenizer = Detokenizer(tokenizer.decode)
    pieces = [detokenizer.add(token) for token in ids]
    assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(ids) == bytes_.decode(errors="replace")


def _byte_letters():
    """The printable letter that stands for each byte in byte-level BPE."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + place) for place, byte in enumerate(others)
    }


def test_text_comes_as_soon_as_its_last_byte(tokenizer):
    detokenizer = Detokenizer(tokenizer.decode)
    ids = tokenizer.backend("a€b", add_special_tokens=False)["input_ids"]
    assert [detokenizer.add(token) for token in ids] == ["a", "", "", "€", "b"]
    assert detokenizer.flush() == ""


def test_a_prompt_without_template_is_sent_as_is(tokenizer):
    assert tokenizer.encode_prompt("hi", raw=False) == tokenizer.encode_prompt("hi", raw=True)
    assert tokenizer.decode(tokenizer.encode_prompt("hi", raw=False)) == "hi"


def test_a_template_makes_it_a_message_unless_raw(tokenizer):
    plain = tokenizer.encode_prompt("hi", raw=True)
    tokenizer.backend.chat_template = TEMPLATE
    assert tokenizer.encode_prompt("hi", raw=False) == [0, 2, *plain, 3]
    assert tokenizer.encode_prompt("hi", raw=True) == plain


def test_a_template_that_fails_is_an_error_with_a_way_out(tokenizer):
    tokenizer.backend.chat_template = "{{ raise_exception('no system message') }}"
    with pytest.raises(SourceError, match="no system message") as caught:
        tokenizer.encode_prompt("hi", raw=False)
    assert "--raw" in caught.value.fix


def test_an_empty_prompt_is_refused(tokenizer):
    with pytest.raises(GenerationError, match="no tokens"):
        tokenizer.encode_prompt("", raw=True)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [5, 6]}, {"eos_token_id": 9}, {5, 6, 1}),
        ({"eos_token_id": 5}, {}, {5, 1}),
        ({}, {"eos_token_id": 9}, {9, 1}),
        (None, {"eos_token_id": [8, 9]}, {8, 9, 1}),
        (None, {"text_config": {"model_type": "x"}, "eos_token_id": 7}, {7, 1}),
        (None, {}, {1}),
    ],
)
def test_stop_tokens(generation, config, expected, tokenizer, tmp_path):
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert stop_tokens(Checkpoint(tmp_path, config, {}), tokenizer) == expected


def test_a_folder_without_tokenizer(tmp_path):
    with pytest.raises(SourceError, match="no tokenizer"):
        load_tokenizer(tmp_path)


def test_a_broken_tokenizer_file(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(SourceError, match="cannot be loaded"):
        load_tokenizer(tmp_path)


def test_a_saved_tokenizer_is_loaded(byte_tokenizer, tmp_path):
    byte_tokenizer.chat_template = TEMPLATE
    byte_tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.has_chat_template
    assert loaded.decode(loaded.encode_prompt("€", raw=True)) == "€"
