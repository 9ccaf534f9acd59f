"""What stands between an operator and the driver, without a GPU: where a kernel is launched, and with what."""

import contextlib
import re
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from quantkit_kernels.operators import on_its_device

pytest.importorskip(
    "cuda.bindings", reason="cuda-bindings is not installed: it comes with CUDA builds of torch"
)

from quantkit_kernels import (
    attention_few,
    byte_stream,
    nvrtc,
    skinny,
    sliced,
    tile,
    wide,
    wide_codes,
    wide_launch,
)
from tests.unit.kernels.test_shared_memory import Format, weight_of


class Driver:
    """Keeps what it is launched with. status: of the launches to come."""

    def __init__(self):
        self.launches, self.status = [], []

    def cuLaunchKernelEx(self, config, _address, _pointers, _extra):
        self.launches.append(config._obj)
        return self.status.pop(0) if self.status else 0


@pytest.fixture
def driver(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(nvrtc.ctypes, "PyDLL", lambda _: driver)
    of_thread = {}
    current_stream = lambda _: of_thread.setdefault(threading.get_ident(), 64 + len(of_thread))  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", current_stream, raising=False)
    return driver


def test_threads_do_not_write_to_each_others_launches(driver):
    kernel = nvrtc.CudaKernel(None, 1, "P", 0)
    kernel.launch((1,), 32, (0,))
    other = threading.Thread(target=kernel.launch, args=((1,), 32, (0,)))
    other.start()
    other.join()
    kernel.launch((1,), 32, (0,))
    assert [config.stream for config in driver.launches] == [64, 65, 64]


def test_a_thread_that_has_not_used_cuda_gets_a_context(driver, monkeypatch):
    given = []
    monkeypatch.setattr(nvrtc, "_ensure_context", given.append)
    driver.status = [nvrtc.INVALID_CONTEXT]
    nvrtc.CudaKernel(None, 1, "P", 3).launch((1,), 32, (0,))
    assert given == [3] and len(driver.launches) == 2


def structs():
    """Of every source: how its parameters are packed, and one kernel of it."""
    group = Format(torch.int32, 128, torch.bfloat16, False)
    weight, bf16 = weight_of(group), torch.bfloat16
    tiling, of_wide = tile.tiling_of(64, weight, 132), wide_launch.fastest(wide.KINDS, 512, weight, 2, 132)
    codes = ("IS_INT8", 1), ("BIAS_KIND", 2)
    few = skinny.Kind(*group[:1], bf16, False, 4, 128, bf16, bf16, 1, True)
    bytes_ = byte_stream.Kind(torch.int8, torch.int8, bf16, False, 8)
    heads = attention_few.Kind(bf16, bf16, False, False, False, 128, 16, 8, 8, 8, 1)
    dequantized = {"W_BITS": 4, "IS_E4M3": 0, "GROUP": 128, "ZERO": 0, "IS_BF16": 1, "SCALE_KIND": 2}
    return {
        "tile_x": (tile.X_PARAMS, (("M_TILE", 64), ("PAIRS", 1))),
        "tile": (tile.PARAMS, tile.defines_of(weight, bf16, tiling)),
        "wide": (wide_launch.PARAMS[2], wide_launch.defines_of(weight, bf16, of_wide, 2)),
        "wide_codes": (
            wide_launch.PARAMS[1],
            (*wide_launch.defines_of(weight, bf16, wide_codes.TILING, 1), *codes),
        ),
        "skinny": (skinny.PARAMS, skinny.defines_of(few, skinny._shape(few), 2)),
        "byte_stream": (
            byte_stream.PARAMS,
            byte_stream.defines_of(bytes_, byte_stream.shape_of(bytes_, 4096, 132)),
        ),
        "decode": (attention_few.PARAMS, attention_few.defines_of(heads)),
        "dequantize": (sliced.PARAMS, tuple(dequantized.items())),
    }


def test_every_source_has_a_struct():
    entries = {path.stem for path in nvrtc.SOURCES.glob("*.cu")}
    assert set(structs()) == entries


@pytest.mark.parametrize("entry", structs())
def test_parameters_are_as_long_as_the_compilers_struct(driver, entry, tmp_path):
    triton = pytest.importorskip(
        "triton", reason="triton is not installed: its disassembler reads the machine code"
    )
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    params, defines = structs()[entry]
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(nvrtc.compile_cubin(f"{entry}.cu", entry, defines, (9, 0)))
    elf = subprocess.run([cuobjdump, "--dump-elf", cubin], check=True, capture_output=True, text=True).stdout
    (size,) = re.findall(r"EIATTR_KPARAM_INFO\s+Format:\s+EIFMT_SVAL\s+Value:.*Size\s*: (0x[0-9a-f]+)", elf)
    assert nvrtc.CudaKernel(None, 1, params, 0)._params.size == int(size, 16)


MACHINE_CODE = b"\x7fELF and so on"


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache, and a list of what was compiled for it."""
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path))
    compiled = []
    monkeypatch.setattr(nvrtc, "compile_cubin", lambda *of: compiled.append(of) or MACHINE_CODE)
    return tmp_path / "kernels", compiled


def cached():
    return nvrtc.cached_cubin("tile_x.cu", "tile_x", (), (9, 0))


def test_machine_code_is_kept_for_every_user(cache):
    folder, compiled = cache
    assert cached() == cached() == MACHINE_CODE and len(compiled) == 1
    (path,) = folder.iterdir()
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_cache_that_cannot_be_written_is_done_without(cache):
    folder, _ = cache
    folder.write_text("no folder")
    assert cached() == MACHINE_CODE


@pytest.mark.parametrize("content", [b"", b"junk", b"\0" * 4096])
def test_what_a_crash_left_is_compiled_again(cache, content):
    folder, compiled = cache
    cached()
    (path,) = folder.iterdir()
    path.write_bytes(content)
    assert cached() == cached() == MACHINE_CODE and len(compiled) == 2


def test_a_cache_of_another_user_is_done_without(cache, monkeypatch):
    def of_another_user(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    for function in ("exists", "read_bytes", "mkdir", "replace"):
        monkeypatch.setattr(nvrtc.Path, function, of_another_user)
    assert cached() == MACHINE_CODE


def test_a_full_disk_is_left_as_it_was(cache, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nvrtc.os, "fsync", full)
    assert cached() == MACHINE_CODE
    assert list(cache[0].iterdir()) == []


def test_a_user_without_a_home_compiles(cache, monkeypatch):
    monkeypatch.delenv("QUANTKIT_CACHE")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    assert cached() == cached() == MACHINE_CODE and len(cache[1]) == 2


def test_the_device_of_the_tensors_is_current_meanwhile(monkeypatch):
    current = [0]

    @contextlib.contextmanager
    def device(there):
        current.append(there)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", device)
    run = on_its_device(lambda tensor, *, more: (current[-1], more))
    for index in (0, 1):
        tensor = SimpleNamespace(is_cuda=True, device=index, get_device=lambda index=index: index)
        assert run(tensor, more=5) == (index, 5)
    assert current == [0]


def test_every_graph_writes_the_tickets_that_it_reads(monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed: it comes with CUDA builds of torch")
    from quantkit_kernels import stream_kernel

    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 0, raising=False)
    monkeypatch.setattr(stream_kernel, "_TICKETS", {})
    is_capturing = [True]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_capturing[0])
    cpu = torch.device("cpu")
    first, second = stream_kernel.tickets_of(cpu), stream_kernel.tickets_of(cpu)
    assert first.data_ptr() != second.data_ptr() and not stream_kernel._TICKETS
    is_capturing[0] = False
    assert stream_kernel.tickets_of(cpu) is stream_kernel.tickets_of(cpu)
