"""An output folder: its states, its removal at any instant, and what is copied into it."""

import os
import shutil
from pathlib import Path

import pytest

from quantkit.errors import OutputError
from quantkit.formats.folder import (
    PLAN_NAME,
    FolderState,
    check_apart,
    copy_companions,
    folder_state,
    remove_run,
    write_json,
)
from quantkit.formats.journal import JOURNAL_NAME, Journal
from tests.checkpoints import LLAMA_CONFIG, llama_tensors
from tests.hub_cache import write_hub_cache


def finished_run(folder: Path) -> Path:
    """A folder as a run leaves it."""
    (folder / "templates").mkdir(parents=True)
    for name in ("model.safetensors", "config.json", "templates/chat.jinja", PLAN_NAME):
        (folder / name).write_text(name)
    return folder


def test_states(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert folder_state(out) is FolderState.EMPTY
    out.mkdir()
    assert folder_state(out) is FolderState.EMPTY
    (out / "thesis.txt").write_text("mine")
    assert folder_state(out) is FolderState.FOREIGN
    (out / PLAN_NAME).write_text("{}")
    assert folder_state(out) is FolderState.FINISHED
    (out / JOURNAL_NAME).write_text('{"key":"a"}\n')
    assert folder_state(out) is FolderState.UNFINISHED
    (out / JOURNAL_NAME).write_text('{"key":"torn')
    assert folder_state(out) is FolderState.HALF_REMOVED
    with pytest.raises(OutputError, match="is a file"):
        folder_state(out / PLAN_NAME)


@pytest.mark.parametrize("journal", [None, '{"key":"a"}\n'])
def test_a_removal_that_is_interrupted_is_neither_finished_nor_foreign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, journal: str | None
) -> None:
    """Die before each removal of a file; a plain run may then clear the rest, and only then."""
    for step in range(100):
        out = finished_run(tmp_path / f"out{step}")
        if journal is not None:
            (out / JOURNAL_NAME).write_text(journal)
        left = iter(range(step, -1, -1))

        def dying(remove, left=left):  # type: ignore[no-untyped-def]
            def call(*arguments, **options):  # type: ignore[no-untyped-def]
                if next(left, 0) == 0:
                    raise KeyboardInterrupt
                return remove(*arguments, **options)

            return call

        with monkeypatch.context() as patch:
            for name in ("unlink", "rmdir"):
                patch.setattr(os, name, dying(getattr(os, name)))
            try:
                remove_run(out)
            except KeyboardInterrupt:
                assert folder_state(out) in {FolderState.HALF_REMOVED, FolderState.EMPTY}
            else:
                assert not out.exists()
                break
        if folder_state(out) is FolderState.HALF_REMOVED:
            remove_run(out)
            assert not out.exists()
    assert step > 5, "there were as many instants as files"


def test_a_run_that_is_being_written_is_not_removed(tmp_path: Path) -> None:
    out = finished_run(tmp_path / "out")
    with Journal(out) as journal:
        journal.append({"key": "of the other process"})
        with pytest.raises(OutputError, match="another process"):
            remove_run(out)
    assert (out / PLAN_NAME).exists()
    assert folder_state(out) is FolderState.UNFINISHED


def test_a_journal_removed_by_its_owner_cannot_be_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between our opening and our locking the other process finishes."""
    from quantkit.formats import journal as journal_module

    def finishes_meanwhile(*_: object) -> None:
        (tmp_path / JOURNAL_NAME).unlink()

    monkeypatch.setattr(journal_module.fcntl, "flock", finishes_meanwhile)
    with pytest.raises(OutputError, match="another process"), Journal(tmp_path):
        pass
    assert not (tmp_path / JOURNAL_NAME).exists()


def test_removal_goes_through_a_link_but_not_beyond_one(tmp_path: Path) -> None:
    finished_run(tmp_path / "real")
    (tmp_path / "real" / "elsewhere").symlink_to(tmp_path / "mine", target_is_directory=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    remove_run(tmp_path / "link")
    assert (tmp_path / "mine" / "thesis.txt").exists()
    assert not list((tmp_path / "real").iterdir())


def test_source_and_output_are_apart(tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    (tmp_path / "link").symlink_to(source, target_is_directory=True)
    for output in (
        source,
        source / "out",
        tmp_path,
        tmp_path / "link" / "deep" / "out",
        source / ".." / "model",
    ):
        with pytest.raises(OutputError, match="one is inside the other"):
            check_apart(source, output)
    check_apart(source, tmp_path / "model-int4")


def test_what_is_copied(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    for name in (
        "tokenizer.json", "README.md", "merges.txt", "vision/preprocessor_config.json", "LICENSE",
        "config.json", "quantkit.json", "quantkit.log.json", "model.safetensors", "model.safetensors.index.json",
        "original/consolidated.00.pth", "original/params.json", "onnx/model.onnx", ".gitattributes", ".cache/x/y",
        "pytorch_model.bin.index.json",
    ):  # fmt: skip
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    out.mkdir()
    copied = copy_companions(source, out)
    assert sorted(copied) == [
        "LICENSE", "README.source.md", "merges.txt", "original/params.json", "tokenizer.json",
        "vision/preprocessor_config.json",
    ]  # fmt: skip
    assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == set(copied)
    assert (out / "README.source.md").read_text() == "README.md"


def test_links_of_a_hub_snapshot_become_files(tmp_path: Path) -> None:
    snapshot = write_hub_cache(tmp_path / "cache", "org/name", llama_tensors(), LLAMA_CONFIG)
    blob = tmp_path / "cache" / "tokenizer-blob"
    blob.write_text("{}")
    (snapshot / "tokenizer.json").symlink_to(blob)
    out = tmp_path / "out"
    out.mkdir()
    assert copy_companions(snapshot, out) == ["tokenizer.json"]
    shutil.rmtree(tmp_path / "cache")
    assert (out / "tokenizer.json").read_text() == "{}"
    assert not (out / "tokenizer.json").is_symlink()


def test_json_has_one_form(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": "é", "a": [1]})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "a": [\n    1\n  ],\n  "b": "é"\n}\n'
