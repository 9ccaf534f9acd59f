"""Triton kernels in its interpreter, on the CPU: what they compute is what the definitions say. One process for all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: it comes with CUDA builds of torch")

ROOT = Path(__file__).parents[3]
SELECTED = {
    "test_gptq_block": "nearest and 33-40 and 4",
    "test_scale_search": "definition and 7-32 and True",
    "test_moments": "float64 or finite",
    "test_attention": "soft_cap and (fp16 or int8 and token)",
    "test_neighbours": "3-129 and not gelu or 1-5-dtype0 or 129-1-dtype0-4 or 33-dtype0-128 or 7-1-1-16"
    " or parts and 8704",
}


def test_the_interpreter_computes_what_the_definitions_say():
    names = " or ".join(f"{file} and ({names})" for file, names in SELECTED.items())
    files = [f"tests/gpu/{file}.py" for file in SELECTED]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", names]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "passed" in done.stdout
