"""CUDA C++ compiled when it is first used, by NVRTC; kept on disk; launched through the driver.

torch's CUDA builds install `cuda-bindings` and NVRTC with them, so there is no toolkit to have, no host compiler, and
no build against one torch. A source file has one entry, `extern "C"`, that takes one struct by value:

    struct Params { void* y; const void* x; int num_rows; };
    extern "C" __global__ void entry(const __grid_constant__ Params p) { … }

and is specialised by -D definitions. What is compiled depends on the text of `csrc/`, the definitions, the capability
and the compiler, and on nothing else; the file's name on disk is a hash of these.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import struct
import tempfile
from pathlib import Path
from typing import Any

import torch

SOURCES = Path(__file__).parent / "csrc"
HEADERS = (
    "common.cuh",
    "weights.cuh",
    "wgmma.cuh",
    "wgmma_order.cuh",
    "wide.cuh",
)  # that a source may include
Defines = tuple[tuple[str, int | str], ...]
ELF = b"\x7fELF"  # what machine code begins with
INSTALL = "pip install 'cuda-bindings>=13,<14' nvidia-cuda-nvrtc"


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint * 16))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("num_attributes", ctypes.c_uint),
    )


CLUSTER_DIMENSION, PROGRAMMATIC_STREAM_SERIALIZATION = 4, 6  # CUlaunchAttributeID
INVALID_CONTEXT = 201  # CUresult


class CudaKernel:
    """One entry on one device. `params`: the fields of its struct, in the letters of Python's `struct` module.

    Launching goes through ctypes: the bindings take 20 us of Python for what the driver does in 2.
    """

    def __init__(self, module: Any, function: Any, params: str, device: int) -> None:
        self._module = module  # unloaded when it is collected
        self._function = function
        self._address = ctypes.c_void_p(int(function))
        self._device = device
        self._params = struct.Struct(f"@{params}0P")  # 0P: it ends with a whole word, as the compiler's does
        self._launch = ctypes.PyDLL("libcuda.so.1").cuLaunchKernelEx
        self._shared_bytes = 48 << 10
        self._configs: dict[tuple[Any, ...], tuple[_Config, Any]] = {}

    def launch(
        self,
        grid: tuple[int, ...],
        threads: int,
        args: tuple[Any, ...],
        *,
        shared_bytes: int = 0,
        cluster: int = 1,
        dependent: bool = False,
    ) -> None:
        """Launch on torch's current stream. args: one value per field; pointers as integers.

        cluster: blocks along x that share their shared memory. dependent: may start before the kernel in front of it
        has ended, and waits by itself (`griddepcontrol.wait`).
        """
        # what `torch.cuda.current_stream` wraps: a step in no graph launches hundreds of kernels
        stream = torch._C._cuda_getCurrentRawStream(self._device)
        key = (grid, threads, shared_bytes, cluster, dependent, stream)  # written once: threads share it
        known = self._configs.get(key)
        if known is None:
            self._allow_shared(shared_bytes)
            known = self._configs[key] = _launch_config(*key)
        packed = ctypes.create_string_buffer(
            self._params.pack(*args)
        )  # the driver copies it before it returns
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(packed))
        status = self._launch(ctypes.byref(known[0]), self._address, pointers, None)
        if status == INVALID_CONTEXT:  # a thread's first: torch gave it memory without asking CUDA
            _ensure_context(self._device)
            status = self._launch(ctypes.byref(known[0]), self._address, pointers, None)
        if status != 0:
            raise RuntimeError(f"CUDA: error {status} when a kernel was launched with {key}")

    def _allow_shared(self, shared_bytes: int) -> None:
        from cuda.bindings import driver

        if shared_bytes > self._shared_bytes:
            _ensure_context(self._device)
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _check(driver.cuFuncSetAttribute(self._function, attribute, shared_bytes))
            self._shared_bytes = shared_bytes


def address(tensor: torch.Tensor | None) -> int:
    """As a pointer among the fields of `launch`; null for None."""
    return 0 if tensor is None else tensor.data_ptr()


def load(file: str, entry: str, params: str, defines: Defines = ()) -> CudaKernel:
    """The kernel on the current device, compiled unless a file on disk has it. Cached for the process."""
    return _load(file, entry, params, defines, torch.cuda.current_device())


@functools.cache
def _load(file: str, entry: str, params: str, defines: Defines, device: int) -> CudaKernel:
    from cuda.bindings import driver

    cubin = cached_cubin(file, entry, defines, torch.cuda.get_device_capability(device))
    _ensure_context(device)
    module = _check(driver.cuModuleLoadData(cubin))
    return CudaKernel(module, _check(driver.cuModuleGetFunction(module, entry.encode())), params, device)


def cached_cubin(file: str, entry: str, defines: Defines, capability: tuple[int, int]) -> bytes:
    """Machine code from the disk, or compiled and put there."""
    options = compile_options(defines, capability)
    texts = [(SOURCES / name).read_text() for name in (*HEADERS, file)]
    parts = [_version(), entry, *options, *texts]
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    folder = cache_folder()
    if folder is None:
        return compile_cubin(file, entry, defines, capability)
    path = folder / f"{entry}-{name}.cubin"
    cubin = _kept(path)
    if cubin is None:
        cubin = compile_cubin(file, entry, defines, capability)
        with contextlib.suppress(OSError):  # no room, or no right to write: the next process compiles again
            _keep(cubin, path)
    return cubin


def _kept(path: Path) -> bytes | None:
    """Machine code that was kept; None where there is none, or none that this user may read."""
    try:
        cubin = path.read_bytes()
    except OSError:
        return None
    return cubin if cubin.startswith(ELF) else None


def _keep(cubin: bytes, path: Path) -> None:
    """Whole or not at all, whoever else compiles it now."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(handle, 0o644)  # the folder may be that of many users
            file.write(cubin)
            file.flush()
            os.fsync(handle)
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)


def cache_folder() -> Path | None:
    """Where machine code is kept; None for a user without a home."""
    configured = os.environ.get("QUANTKIT_CACHE") or "~/.cache/quantkit"
    try:
        return Path(configured).expanduser() / "kernels"
    except RuntimeError:
        return None


def compile_options(defines: Defines, capability: tuple[int, int]) -> list[str]:
    """For NVRTC. From 9.0 on the machine code is for this very architecture, whose own instructions it uses."""
    major, minor = capability
    suffix = "a" if major >= 9 else ""
    options = [f"--gpu-architecture=sm_{major}{minor}{suffix}", "--std=c++17", "-default-device"]
    return options + [f"-D{name}={value}" for name, value in defines]


def compile_cubin(file: str, entry: str, defines: Defines, capability: tuple[int, int]) -> bytes:
    """Compile `csrc/file` for a compute capability; needs no GPU. Raises RuntimeError with the compiler's words."""
    nvrtc = _nvrtc()
    source, headers = (SOURCES / file).read_bytes(), [(SOURCES / name).read_bytes() for name in HEADERS]
    names = [name.encode() for name in HEADERS]
    program = _check(nvrtc.nvrtcCreateProgram(source, file.encode(), len(names), headers, names))
    try:
        options = [option.encode() for option in compile_options(defines, capability)]
        if nvrtc.nvrtcCompileProgram(program, len(options), options)[0].value != 0:
            raise RuntimeError(f"{file} with {dict(defines)} for {capability}:\n{_log(nvrtc, program)}")
        cubin = bytes(_check(nvrtc.nvrtcGetCUBINSize(program)))
        _check(nvrtc.nvrtcGetCUBIN(program, cubin))
    finally:
        _check(nvrtc.nvrtcDestroyProgram(program))
    return cubin


def _log(nvrtc: Any, program: Any) -> str:
    log = bytes(_check(nvrtc.nvrtcGetProgramLogSize(program)))
    _check(nvrtc.nvrtcGetProgramLog(program, log))
    return log.rstrip(b"\0").decode(errors="replace")


@functools.cache
def _version() -> str:
    return "{}.{}".format(*_check(_nvrtc().nvrtcVersion()))


def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise ImportError(f"CUDA kernels are compiled with cuda-bindings: {INSTALL}") from error
    return nvrtc


def _launch_config(
    grid: tuple[int, ...], threads: int, shared_bytes: int, cluster: int, dependent: bool, stream: int
) -> tuple[_Config, Any]:
    """The driver's configuration, and the attributes that it points to."""
    attributes = []
    if cluster > 1:
        attributes.append(_Attribute(CLUSTER_DIMENSION, 0, (cluster, 1, 1)))
    if dependent:
        attributes.append(_Attribute(PROGRAMMATIC_STREAM_SERIALIZATION, 0, (1,)))
    kept = (_Attribute * max(1, len(attributes)))(*attributes)
    config = _Config(
        (*grid, 1, 1)[:3], (threads, 1, 1), shared_bytes, stream, ctypes.addressof(kept), len(attributes)
    )
    return config, kept


def _ensure_context(device: int) -> None:
    """A thread that has none gets torch's context of the device."""
    from cuda.bindings import driver

    if int(_check(driver.cuCtxGetCurrent())) == 0:
        _check(driver.cuCtxSetCurrent(_context(device)))


@functools.cache
def _context(device: int) -> Any:
    from cuda.bindings import driver

    return _check(driver.cuDevicePrimaryCtxRetain(_check(driver.cuDeviceGet(device))))


def _check(result: tuple[Any, ...]) -> Any:
    """The value of a call, or RuntimeError with the name of its error."""
    status, *values = result
    if status.value != 0:
        raise RuntimeError(f"CUDA: {status.name}")
    return values[0] if len(values) == 1 else tuple(values)
