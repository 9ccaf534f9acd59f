"""Calibration windows: where evaluation would put them, conversations as the model is given them."""

import json

import pytest
import torch
from pyarrow import Table, parquet

from quantkit.calibration.tokens import calibration_tokens, with_hash
from quantkit.errors import TextError
from quantkit.text import load_documents
from quantkit.tokens import load_tokenizer, read_windows, tokenize
from tests.tiny_llama import write_tokenizer

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'judge' %}{{ raise_exception('no judges') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% if m.tool_calls %}!{% endif %}{{ '\\n' }}{% endfor %}"
)
CHATS = [
    [{"role": "user", "content": "why would a dog mind?"}, {"role": "assistant", "content": "would it?"}],
    [{"role": "user", "content": [{"type": "text", "text": "or 3 dogs"}, {"type": "image"}]}],
    [{"role": "assistant", "content": None, "tool_calls": [{"name": "fox"}]}],
]
RENDERED = "[user]why would a dog mind?\n[assistant]would it?\n\n\n[user]or 3 dogs\n\n\n[assistant]!\n"
CONTENTS = "why would a dog mind?\n\nwould it?\n\nor 3 dogs"


@pytest.fixture
def model(tmp_path):
    """A folder with a tokenizer and no chat template."""
    folder = tmp_path / "model"
    folder.mkdir()
    write_tokenizer(folder)
    return folder


@pytest.fixture
def chat_model(model):
    (model / "chat_template.jinja").write_text(TEMPLATE)
    return model


def jsonl(path, chats):
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return str(path)


def decoded(model, tokens):
    return load_tokenizer(model).backend.decode(tokens.ids_SL.flatten())


def all_of(model, spec):
    """Every token of a text as one window."""
    with pytest.raises(TextError) as short:
        calibration_tokens(model, spec, 1, 1 << 20)
    count = int(short.value.problem.split(" tokens")[0].split()[-1])
    return calibration_tokens(model, spec, 1, count)


def test_windows_are_those_of_evaluation(model, tmp_path):
    (tmp_path / "a.txt").write_text("The quick brown fox. " * 40 + "\n\n" + "The lazy dog; " * 40)
    spec = str(tmp_path / "a.txt")
    with tokenize(load_documents(spec), load_tokenizer(model)) as stream:
        expected = torch.stack(list(read_windows(stream, 5, 16)))
    tokens = calibration_tokens(model, spec, 5, 16)
    assert torch.equal(tokens.ids_SL, expected) and tokens.roles is None and tokens.spec == spec


def test_conversations_go_through_the_models_template(chat_model, tmp_path):
    tokens = all_of(chat_model, jsonl(tmp_path / "chats.jsonl", CHATS))
    assert decoded(chat_model, tokens) == RENDERED
    assert tokens.roles is not None and "template" in tokens.roles


def test_columns_that_are_null_are_not_given_to_the_template(chat_model, tmp_path):
    rows = [{"messages": [{"role": "user", "content": "a dog", "tool_calls": None}]}]
    parquet.write_table(Table.from_pylist(rows), tmp_path / "chats.parquet")
    tokens = all_of(chat_model, str(tmp_path / "chats.parquet"))
    assert decoded(chat_model, tokens) == "[user]a dog\n"


def test_without_a_template_the_contents_are_taken_and_it_is_said(model, tmp_path):
    tokens = all_of(model, jsonl(tmp_path / "chats.jsonl", CHATS))
    assert decoded(model, tokens) == CONTENTS
    assert tokens.roles is not None and "no chat template" in tokens.roles


def test_a_conversation_that_the_template_refuses_is_named(chat_model, tmp_path):
    spec = jsonl(tmp_path / "chats.jsonl", [*CHATS, [{"role": "judge", "content": "guilty"}]])
    with pytest.raises(TextError, match=r"chats\.jsonl:4: .*no judges"):
        calibration_tokens(chat_model, spec, 1, 4)


def test_too_little_text_is_an_error_with_the_numbers(model, tmp_path):
    (tmp_path / "a.txt").write_text("fox")
    with pytest.raises(TextError, match="needs 512") as caught:
        calibration_tokens(model, str(tmp_path / "a.txt"), 128, 512)
    assert "calibration.length" in caught.value.fix


def test_hash_is_of_shape_and_ids():
    ids = torch.arange(12)
    hashes = {with_hash(ids.view(shape), "x").hash for shape in ((3, 4), (4, 3), (2, 6))}
    assert len(hashes) == 3
    assert with_hash(ids.view(3, 4), "x").hash == with_hash(ids.view(3, 4), "y").hash
    assert with_hash(ids.view(3, 4), "x").hash != with_hash(ids.flip(0).view(3, 4), "x").hash
