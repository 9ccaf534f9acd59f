"""Entries are whole or absent, damage is noticed, and what is old goes first."""

import errno
import os

import pytest
import torch

from quantkit.evaluation.cache import DamagedEntryError, TensorCache

ENTRY_BYTES = 4 * 1000


def entry(value=0):
    return {"a": torch.full((1000,), value, dtype=torch.float32), "b": torch.tensor([value])}


@pytest.fixture
def cache(tmp_path):
    return TensorCache(tmp_path / "cache", free_bytes=0)


def files(cache):
    return sorted(file.stem for file in cache.folder.iterdir())


def age(cache, key, seconds):
    os.utime(cache.folder / f"{key}.safetensors", (seconds, seconds))


def test_what_is_put_is_got(cache):
    assert cache.get("k") is None and not cache.has("k")
    cache.put("k", entry(3))
    assert cache.has("k")
    found = cache.get("k")
    assert found.keys() == {"a", "b"}
    assert torch.equal(found["a"], entry(3)["a"]) and torch.equal(found["b"], entry(3)["b"])


@pytest.mark.parametrize("place", [3, 60, -1, -40, -2000])
def test_one_flipped_bit_is_noticed_and_the_entry_removed(cache, place):
    cache.put("k", entry())
    file = cache.folder / "k.safetensors"
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedEntryError, match=r"k\.safetensors"):
        cache.get("k")
    assert cache.get("k") is None


@pytest.mark.parametrize("length", [0, 5, 100, 2000, -1])
def test_a_truncated_entry_is_noticed(cache, length):
    cache.put("k", entry())
    file = cache.folder / "k.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(DamagedEntryError):
        cache.get("k")


def test_least_recently_used_goes_first(tmp_path):
    cache = TensorCache(tmp_path, limit_bytes=3 * (ENTRY_BYTES + 600), free_bytes=0)
    for number, key in enumerate(("old", "older", "oldest")):
        cache.put(key, entry())
        age(cache, key, 3 - number)
    cache.get("oldest")  # used now, so no longer the oldest
    cache.put("new", entry())
    assert files(cache) == ["new", "old", "oldest"]


def test_an_entry_in_use_is_never_thrown_out(tmp_path):
    cache = TensorCache(tmp_path, limit_bytes=2 * (ENTRY_BYTES + 600), free_bytes=0)
    for number, key in enumerate(("mine", "other")):
        cache.put(key, entry())
        age(cache, key, number)
    cache.in_use = {"mine"}
    cache.put("new", entry())
    assert files(cache) == ["mine", "new"]
    cache.in_use = {"mine", "new"}
    with pytest.raises(OSError, match="limit") as caught:
        cache.put("more", entry())
    assert caught.value.errno == errno.EFBIG
    assert files(cache) == ["mine", "new"]


def test_leftover_of_a_killed_run_goes_like_any_old_file(tmp_path):
    cache = TensorCache(tmp_path, limit_bytes=2 * (ENTRY_BYTES + 600), free_bytes=0)
    leftover = tmp_path / "k.123.tmp"
    leftover.write_bytes(bytes(ENTRY_BYTES))
    os.utime(leftover, (1, 1))
    cache.put("a", entry())
    assert leftover.exists()
    cache.put("b", entry())
    assert files(cache) == ["a", "b"]


def test_the_disk_is_never_filled_up(tmp_path):
    cache = TensorCache(tmp_path, free_bytes=1 << 60)
    with pytest.raises(OSError, match="of its disk would be left"):
        cache.put("k", entry())
    assert files(cache) == []


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(OSError, match="File exists"):
        TensorCache(tmp_path / "cache").put("k", entry())
