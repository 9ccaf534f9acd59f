"""Killed at any instant and started again, a run ends with the bytes of an undisturbed one."""

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.command_line import ENVIRONMENT, ROOT, contents, finish, quantize_command
from tests.random_llama import Sizes, write_random_llama

SMALL = Sizes(hidden=512, inner=1536, layers=4, vocab=2000, kv_heads=2)
LARGER = Sizes(hidden=1024, inner=4096, layers=10, vocab=4000, kv_heads=4)
TIMEOUT = 120

Instant = Callable[[Path, float], bool]  # (output folder, seconds since the start) -> now?


@pytest.mark.parametrize("num_kills", [3, pytest.param(25, marks=pytest.mark.long)])
@pytest.mark.timeout(1200)
def test_killed_and_continued(num_kills: int, tmp_path: Path) -> None:
    sizes, shard_bytes = (SMALL, 4 << 20) if num_kills == 3 else (LARGER, 16 << 20)
    source = write_random_llama(tmp_path / "source", sizes, shard_weights=8 << 20)
    for number in range(100 if num_kills == 3 else 300):  # so that the last phase takes a while, too
        (source / "templates").mkdir(exist_ok=True)
        (source / "templates" / f"{number}.jinja").write_text(str(number))
    undisturbed = tmp_path / "undisturbed"
    with quantizing(source, undisturbed, shard_bytes) as process:
        assert process.wait(TIMEOUT) == 0
    total = stored_bytes(undisturbed)
    killed = tmp_path / "killed"

    random_instants = random.Random(num_kills)
    at = [random_instants.random() for _ in range(num_kills)]
    for instant in instants(at, total):
        kill_at(instant, source, killed, shard_bytes)
    assert folder_state(killed) == "unfinished", "the last kill came too late to prove anything"
    with quantizing(source, killed, shard_bytes) as process:
        assert process.wait(TIMEOUT) == 0

    assert contents(killed) == contents(undisturbed)


def instants(at: list[float], total: int) -> Iterator[Instant]:
    """A kill for each number in [0, 1): a few while planning, most while writing, a few near the end."""
    num_each = max(1, len(at) // 8)
    for fraction in at[:num_each]:
        yield lambda folder, seconds, limit=3 * fraction: seconds > limit or stored_bytes(folder) > 0
    for fraction in sorted(at[num_each:-num_each]):
        yield lambda folder, seconds, limit=fraction * total: stored_bytes(folder) >= limit
    for fraction in sorted(at[-num_each:]):
        # templates are copied after the last shard and before quantkit.json
        yield lambda folder, seconds, limit=fraction: templates(folder) > limit * 0.9 * 100


def kill_at(instant: Instant, source: Path, folder: Path, shard_bytes: int) -> None:
    """Start, wait for the instant, kill."""
    with quantizing(source, folder, shard_bytes) as process:
        started = time.monotonic()
        while not instant(folder, time.monotonic() - started):
            assert process.poll() is None, "finished, or failed, before it could be killed"
            assert time.monotonic() - started < TIMEOUT
            time.sleep(0.001)
        process.kill()
        assert process.wait(TIMEOUT) == -signal.SIGKILL


@contextmanager
def quantizing(source: Path, folder: Path, shard_bytes: int) -> "Iterator[subprocess.Popen[bytes]]":
    """The process; killed if the test fails."""
    command = [sys.executable, "-m", "tests.quantize_process", str(source), str(folder), str(shard_bytes)]
    with subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT) as process:
        try:
            yield process
        finally:
            process.kill()


def stored_bytes(folder: Path) -> int:
    """Bytes of all shards, finished or not."""
    return sum(size(file) for file in folder.glob("model*.safetensors*"))


def size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:  # renamed between looking and asking
        return 0


def templates(folder: Path) -> int:
    return len(list((folder / "templates").glob("[0-9]*.jinja")))


def folder_state(folder: Path) -> str:
    return "unfinished" if (folder / ".quantkit-progress.jsonl").exists() else "finished"


def test_interrupted_from_the_keyboard(tmp_path: Path) -> None:
    source = write_random_llama(tmp_path / "source", SMALL, shard_weights=8 << 20)
    folder = tmp_path / "out"
    command = quantize_command(source, folder)
    with subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as process:
        while stored_bytes(folder) == 0:
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "interrupted" and "Traceback" not in errors
    assert folder_state(folder) == "unfinished"
    assert finish(command).returncode == 0
