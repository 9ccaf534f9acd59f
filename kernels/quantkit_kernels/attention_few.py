"""Attention of a few new tokens in one launch: the host's side of `csrc/decode.cu`, which draws the kernel.

A batch that does not fill the device waits for memory once more for every launch and every address that is read first:
here the parts of a sequence meet in the shared memory of a cluster of blocks, not in a second kernel.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit_kernels import nvrtc
from quantkit_kernels.attention_tile import LOG2_E
from quantkit_kernels.capability import num_multiprocessors, starts_early
from quantkit_kernels.paged_kv import EIGHT_BIT, KVPool, Masking, Pages

MAX_ROWS = 16  # new tokens times query heads of a head
MAX_HEAD_DIM = 128
TOKENS = 16  # of a warp at a time
LONG_CONTEXT = 4096
PARAMS = "9P5q5i2f"
KINDS = {torch.int8: 0, torch.float8_e4m3fn: 1, torch.bfloat16: 2, torch.float16: 3}


class Kind(NamedTuple):
    """What a kernel is compiled for. rows: 8 or 16, that a tile has."""

    q_dtype: torch.dtype
    kv_dtype: torch.dtype
    per_token: bool
    has_window: bool
    has_cap: bool
    head_dim: int
    block_size: int
    rows: int
    cluster: int
    warps: int
    span: int


def takes(q_TQD: Tensor, pool: KVPool, num_rows: int) -> bool:
    """Whether the kernel reads tensors like these: heads in whole words of 16 bytes, on a device with clusters."""
    k_PHSD, head_dim = pool.k_PHSD, q_TQD.shape[2]
    if num_rows > MAX_ROWS or head_dim > MAX_HEAD_DIM or not (q_TQD.is_cuda and starts_early(q_TQD.device)):
        return False
    if k_PHSD.dtype != q_TQD.dtype and k_PHSD.dtype not in EIGHT_BIT:
        return False
    size = k_PHSD.element_size()
    places = [head_dim * size, k_PHSD.data_ptr(), pool.v_PHSD.data_ptr(), q_TQD.data_ptr()]
    places += [stride * size for stride in k_PHSD.stride()[:3]]
    places += [stride * q_TQD.element_size() for stride in q_TQD.stride()[:2]]
    return all(place % 16 == 0 for place in places)


def pays(pool: KVPool, pages: Pages, processors: int) -> bool:
    """Whether one launch is faster than splits and their sum, on an H100 with as many multiprocessors.

    A batch that fills the device is read as fast either way, unless many small scales are read with it. Where blocks
    leave half of the device idle, long contexts of 8-bit elements want it all.
    """
    programs = pages.lengths_B.shape[0] * pool.k_PHSD.shape[1]
    if programs > processors:
        return _has_scale_per_token(pool) and programs <= 4 * processors
    cluster = cluster_of(programs, processors)
    is_long = pages.max_context > 1024 * cluster
    return not (is_long and pool.k_PHSD.dtype in EIGHT_BIT and 4 * programs * cluster < 3 * processors)


def cluster_of(programs: int, processors: int) -> int:
    """Blocks that share a sequence and a head. Clusters of four and more do not find room on all of the device."""
    if 8 * programs <= processors // 2:
        return 8
    if 4 * programs <= processors // 2:
        return 4
    return 2 if 2 * programs <= processors else 1


def warps_of(programs: int, max_context: int, cluster: int, processors: int) -> int:
    """As many as there are tokens for; half where two blocks share a multiprocessor."""
    return 4 if programs > processors or max_context <= 4 * TOKENS * cluster else 8


def span_of(dtype: torch.dtype, max_context: int, cluster: int) -> int:
    """Times 16 tokens that a warp waits for at a time. Of 8-bit elements twice as many have room in registers.

    The longer code costs more than it brings while a warp has but a few to wait for.
    """
    return 2 if dtype in EIGHT_BIT and (cluster == 1 or max_context > LONG_CONTEXT) else 1


def _has_scale_per_token(pool: KVPool) -> bool:
    return pool.k_scale is not None and pool.k_scale.dim() > 1


def launch(
    q_TQD: Tensor, pool: KVPool, pages: Pages, masking: Masking, *, shape: tuple[int, int] | None = None
) -> Tensor:
    """Attention of sequences with at most MAX_ROWS rows to a head, of tensors that `takes` says yes to.

    shape: blocks of a cluster, warps of a block, other than chosen here.
    """
    k_PHSD = pool.k_PHSD
    num_blocks, num_heads, block_size, head_dim = k_PHSD.shape
    batch, group = pages.lengths_B.shape[0], q_TQD.shape[1] // num_heads
    processors = num_multiprocessors(q_TQD.device)
    cluster = cluster_of(batch * num_heads, processors)
    warps = warps_of(batch * num_heads, pages.max_context, cluster, processors)
    cluster, warps = shape or (cluster, warps)
    kind = Kind(
        q_TQD.dtype,
        k_PHSD.dtype,
        _has_scale_per_token(pool),
        masking.window > 0,
        masking.soft_cap > 0,
        head_dim,
        block_size,
        8 if pages.max_q_len * group <= 8 else MAX_ROWS,
        cluster,
        warps,
        span_of(k_PHSD.dtype, pages.max_context, cluster),
    )
    out_TQD = torch.empty(q_TQD.shape, dtype=q_TQD.dtype, device=q_TQD.device)
    tensors = (
        out_TQD,
        q_TQD,
        *pool,
        pages.block_table_BL,
        pages.lengths_B,
        pages.cu_seqlens_q,
    )
    args = (
        *(nvrtc.address(tensor) for tensor in tensors),
        *q_TQD.stride()[:2],
        *(stride * k_PHSD.element_size() for stride in k_PHSD.stride()[:3]),
        pages.block_table_BL.stride(0),
        pages.block_table_BL.shape[1],
        num_blocks,
        group,
        masking.window,
        masking.softmax_scale * LOG2_E,
        masking.soft_cap * LOG2_E,
    )
    kernel, shared_bytes = _plan(kind, q_TQD.get_device())
    grid, threads = (cluster, num_heads, batch), 32 * warps
    kernel.launch(grid, threads, args, shared_bytes=shared_bytes, cluster=cluster, dependent=True)
    return out_TQD


@functools.cache
def _plan(kind: Kind, _device: int) -> tuple[nvrtc.CudaKernel, int]:
    """The kernel on the current device, and the shared memory of a block.

    There: sums, maxima and totals of its warps, what the cluster's blocks send it, and a barrier.
    """
    of_warps = kind.warps * kind.rows * (kind.head_dim + 4 + 2)
    shared_bytes = 4 * (of_warps + kind.rows * kind.head_dim + 2 * kind.cluster * kind.rows) + 8
    return nvrtc.load("decode.cu", "decode", PARAMS, defines_of(kind)), shared_bytes


def defines_of(kind: Kind) -> nvrtc.Defines:
    """What `csrc/decode.cu` is compiled with."""
    return (
        ("Q_KIND", KINDS[kind.q_dtype]),
        ("KV_KIND", KINDS[kind.kv_dtype]),
        ("PER_TOKEN", int(kind.per_token)),
        ("WINDOW", int(kind.has_window)),
        ("CAP", int(kind.has_cap)),
        ("D", kind.head_dim),
        ("BLOCK_SIZE", kind.block_size),
        ("CLUSTER", kind.cluster),
        ("WARPS", kind.warps),
        ("ROWS", kind.rows),
        ("SPAN", kind.span),
    )
