"""Cached folders: complete or not there, whoever is interrupted and however many come at once."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from quantkit.formats.built_once import built_once


def write_two(folder: Path) -> None:
    (folder / "a").write_text("a")
    (folder / "b").write_text("b")


def test_it_is_built_once(tmp_path):
    calls = []
    for _ in range(2):
        target = built_once(tmp_path / "x" / "target", lambda folder: (calls.append(1), write_two(folder)))
    assert sorted(file.name for file in target.iterdir()) == ["a", "b"]
    assert len(calls) == 1


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_a_failed_build_leaves_nothing_and_can_be_repeated(tmp_path, error):
    def fails(folder: Path) -> None:
        (folder / "a").write_text("half")
        raise error

    with pytest.raises(error):
        built_once(tmp_path / "target", fails)
    assert [path.name for path in tmp_path.iterdir()] == [".target.lock"]
    assert (built_once(tmp_path / "target", write_two) / "b").read_text() == "b"


KILLED = """
import sys, time
from pathlib import Path
from quantkit.formats.built_once import built_once

def build(folder):
    (folder / "a").write_text("half")
    print("half", flush=True)
    time.sleep(60)

built_once(Path(sys.argv[1]), build)
"""


def test_a_killed_build_leaves_nothing_that_looks_finished_and_no_lock(tmp_path):
    target = tmp_path / "target"
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, target], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "half\n"
        os.kill(process.pid, signal.SIGKILL)
    assert not target.exists()
    built_once(target, write_two)
    assert sorted(path.name for path in target.iterdir()) == ["a", "b"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".target.lock", "target"]


def test_those_who_come_meanwhile_wait_for_the_first(tmp_path):
    started, go_on = threading.Event(), threading.Event()
    builders, found = [], []

    def slow(folder: Path) -> None:
        builders.append("first")
        started.set()
        assert go_on.wait(10)
        write_two(folder)

    def second(folder: Path) -> None:
        builders.append("second")
        write_two(folder)

    def call(build) -> None:
        found.append(sorted(file.name for file in built_once(tmp_path / "target", build).iterdir()))

    first = threading.Thread(target=call, args=(slow,))
    first.start()
    assert started.wait(10)
    others = [threading.Thread(target=call, args=(second,)) for _ in range(3)]
    for thread in others:
        thread.start()
    go_on.set()
    for thread in [first, *others]:
        thread.join(10)
    assert builders == ["first"]
    assert found == [["a", "b"]] * 4
