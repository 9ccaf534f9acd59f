"""The command line in a process of its own, and what it leaves in a folder."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
QUANTKIT = (sys.executable, "-m", "quantkit")


def quantize_command(source: Path, output: Path) -> list[str]:
    """Every linear to INT4, without data."""
    settings = ["--set", "algorithm=rtn"]
    return [*QUANTKIT, "quantize", str(source), "-r", "int4-all", *settings, "-o", str(output)]


def finish(
    command: list[str], *, before: Callable[[], None] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end. before: called in the new process."""
    return subprocess.run(
        command,
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=200,
        preexec_fn=before,
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the log, which holds times."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in files if path.name != "quantkit.log.json"
    }
