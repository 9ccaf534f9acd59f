"""Shards: where tensors go, that a journal is believed only as far as the files bear it out, and the index."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from quantkit.errors import OutputError
from quantkit.formats.checkpoint import INDEX_NAME, SINGLE_NAME
from quantkit.formats.journal import JOURNAL_NAME
from quantkit.formats.shards import Limits, OutputTensor, ShardWriter

EVERY_ENTRY = Limits(shard_bytes=100, commit_bytes=1)
Entries = Sequence[Sequence[OutputTensor]]


def entries_of(*sizes: Sequence[int]) -> Entries:
    """An entry for each argument, of one uint8 tensor for each size in it."""
    return [
        [OutputTensor(f"t{number}.{part}", torch.uint8, (size,)) for part, size in enumerate(entry)]
        for number, entry in enumerate(sizes)
    ]


def value_of(tensor: OutputTensor) -> torch.Tensor:
    """Bytes that tell tensors apart."""
    return torch.full(tensor.shape, 1 + sum(tensor.name.encode()) % 255, dtype=tensor.dtype)


def write(folder: Path, entries: Entries, *, stop: int | None = None, limits: Limits = EVERY_ENTRY) -> int:
    """Write from where the journal ends up to entry `stop` (None: to the end); returns where that was."""
    with ShardWriter(folder, entries, "key", limits) as writer:
        first = writer.num_done
        for entry in entries[first:stop]:
            for tensor in entry:
                writer.write(tensor.name, value_of(tensor))
            writer.finish_entry({entry[0].name: {"seen": True}})
        if stop is None:
            assert set(writer.notes) == {entry[0].name for entry in entries}
            writer.finish()
            writer.remove_journal()
    return first


def check(folder: Path, entries: Entries) -> dict[str, str]:
    """Every tensor is in the shard that the index says, in its place in the order; returns the index."""
    index = folder / INDEX_NAME
    expected = {tensor.name: value_of(tensor) for entry in entries for tensor in entry}
    if not index.exists():
        found = load_file(folder / SINGLE_NAME)
        weight_map = dict.fromkeys(found, SINGLE_NAME)
    else:
        content = json.loads(index.read_text())
        weight_map = content["weight_map"]
        assert content["metadata"]["total_size"] == sum(map(len, expected.values()))
        shards = {name: load_file(folder / name) for name in set(weight_map.values())}
        assert all(
            set(members) == {n for n, s in weight_map.items() if s == name}
            for name, members in shards.items()
        )
        found = {name: tensor for members in shards.values() for name, tensor in members.items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    left = {path.name for path in folder.iterdir()}
    assert left == set(weight_map.values()) | ({INDEX_NAME} if index.exists() else set())
    return weight_map


def test_an_entry_is_never_divided(tmp_path: Path) -> None:
    entries = entries_of([60], [30, 30], [40], [250], [10])
    write(tmp_path / "out", entries)
    weight_map = check(tmp_path / "out", entries)
    one, two, three, four = (f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4))
    assert weight_map == {
        "t0.0": one, "t1.0": two, "t1.1": two, "t2.0": two, "t3.0": three, "t4.0": four
    }  # fmt: skip


def test_one_shard_needs_no_index(tmp_path: Path) -> None:
    entries = entries_of([50], [50])
    write(tmp_path / "out", entries)
    assert set(check(tmp_path / "out", entries).values()) == {SINGLE_NAME}


@given(
    st.lists(st.lists(st.integers(0, 120), min_size=1, max_size=3), min_size=1, max_size=8),
    st.lists(st.integers(0, 8), max_size=4),
    st.integers(1, 300),
)
@settings(max_examples=30, deadline=None)
def test_any_layout_in_any_number_of_runs(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[list[int]], stops: list[int], shard_bytes: int
) -> None:
    folder, entries = tmp_path_factory.mktemp("any") / "out", entries_of(*sizes)
    limits = Limits(shard_bytes=shard_bytes, commit_bytes=1)
    done = 0
    for stop in stops:
        # an entry of no bytes is journalled with the next one, or with its shard
        assert write(folder, entries, stop=stop, limits=limits) <= done
        done = max(done, min(stop, len(entries)))
    write(folder, entries, limits=limits)
    check(folder, entries)


def test_data_that_is_not_as_planned_is_a_bug(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "out", entries_of([5]), "key") as writer:
        with pytest.raises(AssertionError, match="larger"):
            writer.write("t0.0", [b"123", b"456"])
        with pytest.raises(AssertionError, match="smaller"):
            writer.write("t0.0", [b"123"])


def test_a_torn_line_of_the_journal_is_work_undone(tmp_path: Path) -> None:
    folder, entries = tmp_path / "out", entries_of([60], [60], [60])
    write(folder, entries, stop=2)
    journal = (folder / JOURNAL_NAME).read_bytes()
    whole_lines = [0]
    for end in range(len(journal) + 1):
        if end and journal[end - 1 : end] == b"\n":
            whole_lines.append(end)
        (folder / JOURNAL_NAME).write_bytes(journal[:end])
        if len(whole_lines) == 1:
            continue  # a folder whose journal says nothing is removed before it comes here
        assert write(folder, entries, stop=0) == len(whole_lines) - 2
        assert (folder / JOURNAL_NAME).read_bytes() == journal[: whole_lines[-1]]
    write(folder, entries)
    check(folder, entries)


@pytest.mark.parametrize("junk", [b"{\n", b"[1]\n", b"\0\0\n"])
def test_a_damaged_journal_is_not_guessed_at(tmp_path: Path, junk: bytes) -> None:
    folder, entries = tmp_path / "out", entries_of([60], [60])
    write(folder, entries, stop=1)
    with (folder / JOURNAL_NAME).open("ab") as file:
        file.write(junk)
    with pytest.raises(OutputError, match="damaged") as caught:
        write(folder, entries)
    assert "--overwrite" in caught.value.fix


@pytest.mark.parametrize(
    "name", ["model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors.partial"]
)
@pytest.mark.parametrize("damage", ["removed", "cut"])
def test_a_shard_that_the_journal_knows_has_to_be_there(tmp_path: Path, name: str, damage: str) -> None:
    folder, entries = tmp_path / "out", entries_of([60], [60], [20], [90])
    write(folder, entries, stop=2)
    if damage == "removed":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes((folder / name).read_bytes()[:-1])
    with pytest.raises(OutputError, match="missing or shorter"):
        write(folder, entries)


@pytest.mark.parametrize("change", ["key", "shape", "order", "limit"])
def test_another_plan_is_refused(tmp_path: Path, change: str) -> None:
    folder, entries = tmp_path / "out", entries_of([60], [60], [20])
    write(folder, entries, stop=1)
    other = {"shape": entries_of([60], [60], [21]), "order": entries[::-1]}.get(change, entries)
    limits = Limits(shard_bytes=1000) if change == "limit" else EVERY_ENTRY
    with (
        pytest.raises(OutputError, match="unfinished run of another plan"),
        ShardWriter(folder, other, "other" if change == "key" else "key", limits),
    ):
        pass
    write(folder, entries)
    check(folder, entries)


def test_a_second_writer_waits_outside(tmp_path: Path) -> None:
    folder, entries = tmp_path / "out", entries_of([60], [60])
    with (
        ShardWriter(folder, entries, "key", EVERY_ENTRY),
        pytest.raises(OutputError, match="another process is writing here"),
    ):
        write(folder, entries)
    write(folder, entries)
    check(folder, entries)


def test_a_folder_that_was_filled_meanwhile_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "config.json").write_text("of another process, which has just finished")
    with pytest.raises(OutputError, match="has just written here"):
        write(folder, entries_of([60]))
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_what_is_finished_is_kept_when_the_disk_fills_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a commit in between: one is made on the way out."""
    folder, entries = tmp_path / "out", entries_of([60], [60], [60])
    seldom = Limits(commit_seconds=1000)
    with pytest.raises(OSError, match="No space"), ShardWriter(folder, entries, "key", seldom) as writer:
        writer.write("t0.0", value_of(entries[0][0]))
        writer.finish_entry({"t0.0": {}})
        raise OSError(28, "No space left on device")
    with ShardWriter(folder, entries, "key", seldom) as writer:
        assert writer.num_done == 1


def test_after_a_failed_sync_nothing_is_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system reports lost data once, so the next sync succeeds and proves nothing."""
    folder, entries = tmp_path / "out", entries_of([60], [60])
    with monkeypatch.context() as patch:
        failures = iter([OSError(5, "Input/output error")])

        def fdatasync(descriptor: int) -> None:
            error = next(failures, None)
            if error:
                raise error

        patch.setattr("os.fdatasync", fdatasync)
        with pytest.raises(OSError, match="Input/output") as caught:
            write(folder, entries, stop=1)
    assert str(caught.value.filename).endswith(".partial"), "the error names the file"
    with ShardWriter(folder, entries, "key", EVERY_ENTRY) as writer:
        assert writer.num_done == 0
