"""The kernels that draw tokens, without a GPU: they compile, stay in registers, and do what the definition says."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: it comes with CUDA builds of torch")

from quantkit_kernels import draw_kernel, filter_kernel
from tests.triton_aot import CAPABILITIES, compile_for

ROOT = Path(__file__).parents[3]
POINTERS = {
    **dict.fromkeys(
        ("settings", "brackets", "inner_brackets", "lengths", "inner_lengths", "cuts", "ties"), "*i32"
    ),
    **dict.fromkeys(("maxes", "rows", "positions", "keys"), "*i64"),
    "sums": "*fp32",
}
NUMBERS = ("num_logits", "num_maxes", "num_parts", "per_program", "stride_logits")
CONSTANTS = {"PARTS": 32, "MAXES": 64, "PART": filter_kernel.PART, "WIDTH": filter_kernel.WIDTH}


def compile_kernel(kernel, capability, warps, *, dtype="bf16", **constants):
    """128,256 logits of a dtype in each row."""
    types = POINTERS | {"logits": f"*{dtype}", "lists": "*i16" if dtype == "bf16" else "*i32"}
    types |= dict.fromkeys(NUMBERS, "i32")
    known = (
        CONSTANTS
        | {"SHIFT": {"bf16": 16, "fp16": 13, "fp32": 0}[dtype], "EARLY": capability >= 90}
        | constants
    )
    names = kernel.arg_names
    return compile_for(
        kernel,
        capability,
        {name: types[name] for name in names if name in types},
        {name: known[name] for name in names if name not in types},
        warps,
        multiples=tuple(name for name in ("num_logits", "num_parts", "stride_logits") if name in names),
    )


@functools.cache
def compile_all(capability, dtype="bf16"):
    """The kernels of a draw with filters, by name, of their two variants the longer."""
    threads = 32 * filter_kernel.WEIGH_WARPS
    compiled = functools.partial(compile_kernel, capability=capability, dtype=dtype)
    sizes = {"IS_FIRST": True, "SIZE": filter_kernel.PART, "THREADS": threads}
    return {
        "weigh": compiled(filter_kernel.weigh_kernel, warps=filter_kernel.WEIGH_WARPS, **sizes),
        "list": compiled(filter_kernel.list_kernel, warps=filter_kernel.LIST_WARPS, IS_FIRST=True),
        "cut": compiled(filter_kernel.cut_kernel, warps=filter_kernel.CUT_WARPS),
        "draw": compiled(draw_kernel.draw_kernel, warps=draw_kernel.NUM_WARPS, IS_FILTERED=True),
    }


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_compile_and_stay_in_registers(capability):
    for name, resources in compile_all(capability).items():
        assert resources.stack == 0, name
        assert "LDL" not in resources.sass and "STL" not in resources.sass, name
        waits, starts = "ACQBULK" in resources.sass, "PREEXIT" in resources.sass
        assert waits == starts == (capability >= 90), name
        if waits:
            before = resources.sass.partition("ACQBULK")[0]
            assert "LDG" not in before and "STG" not in before, f"{name} waits for the kernel before"


def test_float32_stays_in_registers():
    for name, resources in compile_all(90, "fp32").items():
        assert resources.stack == 0, name


def test_logits_are_read_16_bytes_at_a_time_and_programs_share_a_multiprocessor():
    for name, resources in compile_all(90).items():
        if name != "cut":
            assert len(re.findall(r"LDG\.E[.\w]*\.128", resources.sass)) >= 2, name
            assert resources.registers <= 128, f"{name}: two programs of 8 warps"
        assert resources.shared <= 100 << 10, name


def test_the_second_round_compiles():
    threads = 32 * filter_kernel.WEIGH_WARPS
    compile_kernel(
        filter_kernel.weigh_kernel,
        90,
        filter_kernel.WEIGH_WARPS,
        IS_FIRST=False,
        SIZE=8 * threads,
        THREADS=threads,
    )
    compile_kernel(filter_kernel.list_kernel, 90, filter_kernel.LIST_WARPS, IS_FIRST=False)
    compile_kernel(draw_kernel.draw_kernel, 90, draw_kernel.NUM_WARPS, IS_FILTERED=False)


def test_the_interpreter_computes_what_the_definitions_say():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu/test_sampler.py"]
    command += ["-k", "(5-dtype0 and not masked) or flat-4097 or nan"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "passed" in done.stdout
