"""Triton kernels compiled for GPUs that are not there, and what the machine code takes.

Needs triton, not a GPU.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
CAPABILITIES = (80, 89, 90, 100, 120)


_COMPILED: dict[tuple, "Resources"] = {}


class Resources(NamedTuple):
    """Of one kernel: 32-bit registers of a thread, bytes of its stack, bytes of shared memory of a program."""

    registers: int
    stack: int
    shared: int
    sass: str


def compile_for(
    kernel,
    capability: int,
    types: dict[str, str],
    constants: dict,
    num_warps: int,
    *,
    multiples: tuple[str, ...] = (),
    **options,
) -> Resources:
    """Compile a kernel, once for all tests. types: Triton's names (`*fp32`, `i32`) of its arguments.

    Pointers are 16-byte aligned. multiples: numbers that are multiples of 16. options: of Triton's compiler,
    `num_stages` say.
    """
    key = (kernel, capability, *map(_items, (types, constants, options)), num_warps, multiples)
    if key not in _COMPILED:
        options = {"num_warps": num_warps} | options
        _COMPILED[key] = _compile(
            kernel, GPUTarget("cuda", capability, 32), types, constants, options, multiples
        )
    return _COMPILED[key]


def _items(named: dict) -> frozenset:
    return frozenset(named.items())


def _compile(
    kernel,
    target: GPUTarget,
    types: dict[str, str],
    constants: dict,
    options: dict,
    multiples: tuple[str, ...],
) -> Resources:
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in types.items()
        if kind[0] == "*" or name in multiples
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=target, options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        command = [CUOBJDUMP, "--dump-resource-usage", "--dump-sass", cubin]
        sass = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", sass)
    assert found is not None, sass[-1000:]
    return Resources(int(found[1]), int(found[2]), compiled.metadata.shared, sass)
