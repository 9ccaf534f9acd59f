"""Every kind of SPEC gives its documents, and everything unreadable is named."""

import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from quantkit.errors import TextError
from quantkit.text import load_documents, row_texts


def write(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def test_txt_documents_end_at_blank_lines(tmp_path):
    spec = write(tmp_path / "a.txt", "one\nstill one\n\n   \n\n  two, indented\r\nstill two\n\n\n")
    assert list(load_documents(spec)) == ["one\nstill one", "  two, indented\nstill two"]


def test_txt_byte_order_mark_is_not_text(tmp_path):
    assert list(load_documents(write(tmp_path / "a.txt", b"\xef\xbb\xbfone"))) == ["one"]


def test_documents_can_be_read_again(tmp_path):
    documents = load_documents(write(tmp_path / "a.txt", "one\n\ntwo"))
    assert list(documents) == list(documents) == ["one", "two"]


def test_jsonl_takes_text_and_messages(tmp_path):
    parts = [{"type": "image"}, {"type": "text", "text": "what is it?"}]
    rows = [
        {"text": "plain", "id": 3},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": None}]},
        {"text": None},
    ]
    spec = write(tmp_path / "a.jsonl", "\n\n".join(json.dumps(row) for row in rows))
    assert [text.strip() for text in load_documents(spec)] == ["plain", "hi\n\nhello", "what is it?"]


def test_parquet_takes_text_and_messages(tmp_path):
    parquet.write_table(pa.table({"id": [1, 2], "text": ["one", "two"]}), tmp_path / "a.parquet")
    chat = [[{"role": "user", "content": "three"}]]
    parquet.write_table(pa.table({"messages": chat}), tmp_path / "b.parquet")
    assert list(load_documents(str(tmp_path))) == ["one", "two", "three"]


def test_folder_is_read_in_the_order_of_names(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "b.txt", "second")
    write(tmp_path / "a.jsonl", '{"text": "first"}')
    write(tmp_path / "sub" / "c.txt", "third")
    write(tmp_path / "notes.md", "not read")
    assert list(load_documents(str(tmp_path))) == ["first", "second", "third"]


def test_what_is_calibrated_on_is_not_what_is_judged_by():
    judged, calibrated = load_documents("docs"), load_documents("docs", use="calibrate")
    assert not set(judged) & set(calibrated)


def test_docs_are_the_same_twice_and_hold_enough_for_the_default_windows():
    documents = list(load_documents("docs"))
    assert documents == list(load_documents("docs"))
    assert sum(map(len, documents)) > 10 * 24 * 512
    assert len(set(documents)) == len(documents)


def test_rows_of_a_dataset_are_documents():
    assert list(row_texts(iter([{"text": "one"}, {"text": "two"}]), "hf:x")) == ["one", "two"]


BAD_FILES = {
    "empty.txt": (b"", "holds no text"),
    "blank.txt": (b"\n \n\t\n", "holds no text"),
    "latin.txt": (b"caf\xe9 au lait", "0xe9"),
    "latin.jsonl": (b'{"text": "caf\xe9"}', "0xe9"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": ', "broken.jsonl:2: not valid JSON"),
    "deep.jsonl": (b"[" * 100_000, "deep.jsonl:1: not valid JSON"),
    "list.jsonl": (b"[1]", "not an object but list"),
    "keys.jsonl": (b'{"content": "a", "id": 1}', "neither text nor messages, only content, id"),
    "number.jsonl": (b'{"text": 3}', "not a string but int"),
    "chat.jsonl": (b'{"messages": [{"content": "a"}]}', "role, content"),
    "parts.jsonl": (b'{"messages": [{"role": "user", "content": [3]}]}', "role, content"),
    "surrogate.jsonl": (b'{"text": "\\ud800"}', "not a valid string"),
    "nothing.jsonl": (b'{"text": ""}', "holds no text"),
    "broken.parquet": (b"PAR1 but not really", "not readable as parquet"),
    "empty.parquet": (b"", "not readable as parquet"),
    "table.csv": (b"text\na", "of kind .csv"),
    "noname": (b"text", "no suffix"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_named_with_what_is_wrong(tmp_path, name):
    content, finding = BAD_FILES[name]
    spec = write(tmp_path / name, content)
    with pytest.raises(TextError) as caught:
        list(load_documents(spec))
    assert name in caught.value.problem and finding in caught.value.problem
    assert caught.value.fix and "\n" not in caught.value.problem + caught.value.fix


def test_parquet_without_text_lists_its_columns(tmp_path):
    parquet.write_table(pa.table({"question": ["a"], "answer": ["b"]}), tmp_path / "a.parquet")
    with pytest.raises(TextError, match="only question, answer"):
        list(load_documents(str(tmp_path)))


@pytest.mark.parametrize("spec", ["nowhere.txt", "nowhere", "hf:", "hf:a//b", "hf:a/b/c/d", "hf:a/b:"])
def test_spec_that_names_nothing(spec):
    with pytest.raises(TextError, match=spec):
        load_documents(spec)


def test_folder_without_text(tmp_path):
    with pytest.raises(TextError, match=r"no \.txt"):
        load_documents(str(tmp_path))


def test_dataset_that_cannot_be_reached(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(TextError, match="hf:nobody/nothing:test: cannot be loaded"):
        list(load_documents("hf:nobody/nothing:test"))
