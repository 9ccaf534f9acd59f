"""How a copy engine is told of a matrix in memory (`cp.async.bulk.tensor`, compute capability 9.0): a `CUtensorMap`.

Boxes of rows x columns are copied to shared memory with rows of 128 bytes, whose eight chunks of 16 bytes are in the
order c ^ (r % 8): what tensor cores read without bank conflicts. Beyond the matrix there are zeros.
"""

import ctypes
import functools

import torch
from torch import Tensor

NUM_BYTES, ALIGNMENT = 128, 64
DATA_TYPES = {
    torch.float16: 6,
    torch.bfloat16: 9,
    torch.int8: 0,
    torch.float8_e4m3fn: 0,
}  # CUtensorMapDataType
NOT_INTERLEAVED, SWIZZLE_128_BYTES, PROMOTE_TO_256_BYTES, ZEROS_BEYOND = 0, 3, 3, 0


def tensor_map(x_MK: Tensor, box_rows: int, box_columns: int) -> bytes:
    """Of a matrix; boxes of at most 256 rows and 128 bytes of columns."""
    assert x_MK.stride()[1] == 1, "columns are not next to each other"
    size = x_MK.element_size()
    return map_of(x_MK.data_ptr(), *x_MK.shape, x_MK.stride()[0] * size, x_MK.dtype, box_rows, box_columns)


@functools.lru_cache(maxsize=1 << 14)
def map_of(
    pointer: int,
    rows: int,
    columns: int,
    stride_bytes: int,
    dtype: torch.dtype,
    box_rows: int,
    box_columns: int,
) -> bytes:
    """Of memory that is so laid out, on which alone it depends; rows start at multiples of 16 bytes."""
    assert stride_bytes % 16 == 0 and pointer % 16 == 0, f"rows not aligned: {stride_bytes} from {pointer:#x}"
    assert box_rows <= 256 and box_columns * dtype.itemsize <= 128, f"boxes of {box_rows} x {box_columns}"
    memory = ctypes.create_string_buffer(NUM_BYTES + ALIGNMENT)
    skipped = -ctypes.addressof(memory) % ALIGNMENT
    status = _encode()(
        ctypes.c_void_p(ctypes.addressof(memory) + skipped),
        DATA_TYPES[dtype],
        2,
        ctypes.c_void_p(pointer),
        (ctypes.c_uint64 * 2)(columns, rows),
        (ctypes.c_uint64 * 1)(stride_bytes),
        (ctypes.c_uint32 * 2)(box_columns, box_rows),
        (ctypes.c_uint32 * 2)(1, 1),
        NOT_INTERLEAVED,
        SWIZZLE_128_BYTES,
        PROMOTE_TO_256_BYTES,
        ZEROS_BEYOND,
    )
    if status != 0:
        raise RuntimeError(
            f"CUDA: error {status} for a map of {rows} x {columns} {dtype} by {stride_bytes} bytes"
        )
    return memory.raw[skipped : skipped + NUM_BYTES]


@functools.cache
def _encode() -> "ctypes._NamedFuncPointer":
    return ctypes.PyDLL("libcuda.so.1").cuTensorMapEncodeTiled
