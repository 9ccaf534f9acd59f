"""Disks that are full or read-only: two lines, exit 2, finished work kept, and the run continues."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.test_kill import ROOT, content, write_model


def quantize(source: Path, output: Path, file_limit: int | None = None) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own; file_limit: bytes that a file may grow to, as on a full disk."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}

    def limit() -> None:
        if file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

    command = [sys.executable, "-m", "quantkit", "quantize", source, "-r", "int4-all", "-o", output]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=200, preexec_fn=limit
    )


def assert_two_lines(done: subprocess.CompletedProcess[str], words: str) -> None:
    """Exit 2, one line of problem that holds the words, one of fix."""
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith(("error: ", "  fix: "))]
    assert len(lines) == 2, done.stderr
    assert words in lines[0]
    assert "Traceback" not in done.stderr


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 6 MB of its own; needs the right to mount."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", folder], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_writing_stops_in_the_middle_and_continues(tmp_path):
    source = write_model(tmp_path / "source", layers=4)
    assert quantize(source, tmp_path / "undisturbed").returncode == 0
    output = tmp_path / "out"
    assert_two_lines(quantize(source, output, file_limit=5_000_000), "model.safetensors")
    assert not (output / "config.json").exists()
    assert quantize(source, output).returncode == 0
    assert content(output) == content(tmp_path / "undisturbed")


def test_a_disk_that_is_too_small_is_seen_at_once(tmp_path, small_disk):
    source = write_model(tmp_path / "source", layers=4)
    assert_two_lines(quantize(source, small_disk / "out"), "GB are left")
    subprocess.run(["mount", "-o", "remount,size=60m", small_disk], check=True)
    assert quantize(source, small_disk / "out").returncode == 0


def test_a_read_only_disk(tmp_path, small_disk):
    source = write_model(tmp_path / "source", layers=1)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert_two_lines(quantize(source, small_disk / "out"), "Read-only")
