"""Disks that are full, read-only or forbidden: two lines, exit 2, finished work kept, and the run continues."""

import os
import resource
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from quantkit.cli.main import run
from tests.command_line import ENVIRONMENT, ROOT, contents, finish, quantize_command
from tests.random_llama import Sizes, write_random_llama
from tests.tiny_llama import write_tiny_llama

SIZES = Sizes(hidden=512, inner=1536, layers=4, vocab=2000, kv_heads=2)
NOBODY = 65534


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_llama(tmp_path_factory.mktemp("source") / "model", SIZES, shard_weights=8 << 20)


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    assert run(quantize_command(source, output)[3:]) == 0
    return contents(output)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fails(command: list[str], *words: str, before: Callable[[], None] | None = None) -> None:
    """It exits with 2 and ends in two lines that hold the words."""
    done = finish(command, before=before)
    assert done.returncode == 2, done.stderr
    *_, problem, fix = done.stderr.splitlines()
    assert problem.startswith("error: ") and fix.startswith("  fix: "), done.stderr
    assert all(word in problem + fix for word in words), done.stderr
    assert "Traceback" not in done.stderr


def limited(num_bytes: int) -> Callable[[], None]:
    """No file may grow beyond this, as where a disk fills up in the middle of a shard."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


def test_a_file_that_cannot_grow_and_later_can(
    source: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    for num_bytes in (3_000_000, 6_000_000):
        fails(
            quantize_command(source, output),
            "model.safetensors.partial",
            "free some space",
            before=limited(num_bytes),
        )
        assert not (output / "config.json").exists()
    assert finish(quantize_command(source, output)).returncode == 0
    assert contents(output) == undisturbed


def test_a_disk_that_somebody_else_fills(source: Path, undisturbed: dict[str, bytes], disk: Path) -> None:
    """There was room at the start, so it is the writing that fails, and finished work is kept."""
    subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
    ballast, output = disk / "ballast", disk / "out"
    command = quantize_command(source, output)

    def fill(line: str) -> None:
        if "layers.2." in line and not ballast.exists():
            free = os.statvfs(disk)
            ballast.write_bytes(bytes(free.f_bavail * free.f_bsize - 300_000))

    returncode, lines = watched(command, fill)
    assert returncode == 2, lines
    assert lines[-2].startswith(f"error: {output}/") and "No space left on device" in lines[-2]
    assert "finished work is kept" in lines[-1]
    ballast.unlink()
    _, lines = watched(command, lambda line: None)
    assert not any("layers.0." in line for line in lines), "the first layer was kept"
    assert contents(output) == undisturbed


def watched(command: list[str], see: Callable[[str], None]) -> tuple[int, list[str]]:
    """Run a command, seeing every line of its progress as it comes."""
    lines = []
    with subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line.rstrip("\n"))
            see(line)
    return process.returncode, lines


def test_a_disk_that_is_too_small_is_seen_at_once(
    source: Path, undisturbed: dict[str, bytes], disk: Path
) -> None:
    fails(quantize_command(source, disk / "out"), "GB are left", "free some space")
    assert not list(disk.iterdir())
    subprocess.run(["mount", "-o", "remount,size=60m", disk], check=True)
    assert run(quantize_command(source, disk / "out")[3:]) == 0
    assert contents(disk / "out") == undisturbed


def test_a_read_only_disk(tmp_path: Path, disk: Path) -> None:
    source = write_tiny_llama(tmp_path / "model")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    fails(quantize_command(source, disk / "out"), "Read-only", "give a folder")


@pytest.fixture
def as_nobody() -> Iterator[Callable[[list[str]], int]]:
    """Runs a command line in this process with the rights of somebody else."""
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")

    def run_as(command: list[str]) -> int:
        os.seteuid(NOBODY)
        try:
            return run(command)
        finally:
            os.seteuid(0)

    return run_as


def test_somebody_elses_folders_and_files(
    as_nobody: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    with tempfile.TemporaryDirectory() as name:  # not tmp_path, which only its owner may enter
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "open").mkdir()
        (folder / "open").chmod(0o777)
        source, output = write_tiny_llama(folder / "model"), folder / "open" / "out"
        for path in source.iterdir():
            path.chmod(0o644)
        command = quantize_command(source, folder / "mine")[3:]
        assert run(command) == 0  # and loads every module, which somebody else may not read
        assert as_nobody(quantize_command(source, folder / "out")[3:]) == 2
        assert f"{folder}/out: Permission denied" in capsys.readouterr().err
        for file, problem in (
            ("tokenizer.json", "cannot be read"),
            ("model.safetensors", "Permission denied"),
        ):
            (source / file).chmod(0o600)
            assert as_nobody(quantize_command(source, output)[3:]) == 2
            assert f"{source}/{file}: {problem}" in capsys.readouterr().err
            assert not output.exists(), "noticed before anything was written"
            (source / file).chmod(0o644)
        assert as_nobody(quantize_command(source, output)[3:]) == 0
