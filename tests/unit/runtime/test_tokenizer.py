"""Prompts, conversations and stop tokens."""

import json

import pytest

from quantkit.errors import GenerationError, SourceError
from quantkit.formats.checkpoint import Checkpoint
from quantkit.runtime.tokenizer import Tokenizer, load_tokenizer, stop_tokens
from tests.byte_tokenizer import TEMPLATE


@pytest.fixture
def tokenizer(byte_tokenizer, tmp_path):
    return Tokenizer(tmp_path, byte_tokenizer)


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


def test_a_conversation_goes_through_the_template(tokenizer):
    tokenizer.backend.chat_template = TEMPLATE
    hi, bye = (tokenizer.encode_prompt(text, raw=True) for text in ("hi", "bye"))
    messages = [{"role": "user", "content": "hi"}, {"role": "user", "content": "bye"}]
    assert tokenizer.encode_chat(messages) == [0, 2, *hi, 2, *bye, 3]
    assert tokenizer.encode_chat(messages[:1]) == tokenizer.encode_prompt("hi", raw=False)


def test_a_base_model_takes_no_conversation(tokenizer):
    with pytest.raises(GenerationError, match="no chat template: a base model") as caught:
        tokenizer.encode_chat([{"role": "user", "content": "hi"}])
    assert "as a prompt" in caught.value.fix


@pytest.mark.parametrize(
    ("messages", "finding"),
    [
        ([], "no messages"),
        (["hi"], "not a role and a content"),
        ([{"content": "hi"}], "not a role and a content"),
        ([{"role": "user", "content": None}], "not a role and a content"),
        ([{"role": "user", "content": "hi", "name": "me"}], "not a role and a content"),
        ([{"role": "user", "content": "\ud800"}], "not UTF-8"),
    ],
)
def test_messages_that_are_none(messages, finding, tokenizer):
    tokenizer.backend.chat_template = TEMPLATE
    with pytest.raises(GenerationError, match=finding):
        tokenizer.encode_chat(messages)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages.append(messages[0]) }}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    ],
)
def test_a_template_refuses_messages_and_cannot_leave_its_sandbox(template, tokenizer):
    tokenizer.backend.chat_template = template
    with pytest.raises(GenerationError, match="does not take these messages"):
        tokenizer.encode_chat([{"role": "user", "content": "hi"}])


def test_special_tokens_have_text_only_when_asked_for(tokenizer):
    ids = [2, *tokenizer.encode_prompt("hi", raw=True), 1]
    assert tokenizer.decode(ids) == "hi"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<user>hi<eos>"
    assert [tokenizer.decode_one(1, skip_special_tokens=skips) for skips in (True, False, True)] == [
        "",
        "<eos>",
        "",
    ]


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
    assert stop_tokens(Checkpoint(tmp_path, config, {}), tokenizer, vocab_size=10) == expected


@pytest.mark.parametrize("eos", [10, -1, [5, 10], "5", True])
def test_what_is_no_token_ends_nothing(eos, tokenizer, tmp_path):
    with pytest.raises(SourceError, match=r"eos_token_id .* which has 10"):
        stop_tokens(Checkpoint(tmp_path, {"eos_token_id": eos}, {}), tokenizer, vocab_size=10)


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


def test_a_token_that_is_no_character_has_bytes(tokenizer):
    ids = tokenizer.encode_prompt("€", raw=True)
    assert b"".join(tokenizer.bytes_of_one(token_id) for token_id in ids) == "€".encode()
    assert tokenizer.bytes_of_one(tokenizer.backend.vocab_size) is None  # there is no such token


def test_a_template_is_told_its_options(tokenizer):
    tokenizer.backend.chat_template = "{% if enable_thinking %}a{% else %}b{% endif %}"
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.decode(tokenizer.encode_chat(messages, options={"enable_thinking": True})) == "a"
    assert tokenizer.decode(tokenizer.encode_chat(messages)) == "b"
