"""Work shared out evenly: tiles whose k are cut where a program's share ends, and added up again in a fixed order.

A product is `tiles × steps` units, a unit being BK columns of one tile. Whole waves of tiles are dealt one by one; what
is left, less than a tile each, is one line of units cut into equal shares:

    tiles    |---- t0 ----|---- t1 ----|---- t2 ----|
    programs |   p0   |   p1   |   p2   |   p3  …       t0 = p0 + p1, t1 = p1 + p2, …

Who has a part of a tile leaves it in `partial` and draws a ticket; who draws the last adds the parts up by index of
program, whichever came first. So the cuts and the order of summation depend on the shapes alone, and every run gives
the same bits. `tickets` holds zeros between launches; where no tile is cut (`is_cut`) nobody reads it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_PROGRAMS = 4096
_TICKETS: dict[tuple[int, int], Tensor] = {}


@triton.jit
def share_of(pid, num_programs, num_tiles, steps):
    """Whole tiles first: (waves, first unit, last unit, items); units are counted over all tiles."""
    waves = num_tiles // num_programs
    dealt = waves * num_programs * steps
    rest = (num_tiles * steps - dealt).to(tl.int64)
    first = dealt + (pid * rest // num_programs).to(tl.int32)
    last = dealt + ((pid + 1) * rest // num_programs).to(tl.int32)
    cut = tl.where(last > first, (last - 1) // steps - first // steps + 1, 0)
    return waves, first, last, waves + cut


@triton.jit
def item_of(item, pid, num_programs, waves, first, last, steps):
    """(tile, first step, end of steps) of one of a program's items."""
    tile = tl.where(item < waves, item * num_programs + pid, first // steps + item - waves)
    start = tl.where(item < waves, 0, tl.maximum(first - tile * steps, 0))
    end = tl.where(item < waves, steps, tl.minimum(last - tile * steps, steps))
    return tile, start, end


@triton.jit
def program_of(unit, num_programs, rest):
    """Whose share a unit of the line is in."""
    return (((unit + 1).to(tl.int64) * num_programs - 1) // rest).to(tl.int32)


@triton.jit
def add_up(acc, partial, tickets, tile, start, pid, num_programs, num_tiles, steps):
    """Leave this part; whoever is last has the sum: (acc, is_last). partial: [2 · programs, size of acc]."""
    waves = num_tiles // num_programs
    in_line = tile - waves * num_programs
    rest = ((num_tiles - waves * num_programs) * steps).to(tl.int64)
    row = tl.arange(0, acc.shape[0])[:, None]
    at = row * acc.shape[1] + tl.arange(0, acc.shape[1])[None, :]
    size: tl.constexpr = acc.shape[0] * acc.shape[1]
    # a program has two cut tiles at most: the one it ends with begins in it
    tl.store(partial + (2 * pid + (start == 0)).to(tl.int64) * size + at, acc)
    tl.debug_barrier()
    drawn = tl.atomic_add(tickets + in_line, 1, sem="acq_rel")
    head = program_of(in_line * steps, num_programs, rest)
    tail = program_of(in_line * steps + steps - 1, num_programs, rest)
    is_last = drawn == tail - head
    if is_last:
        acc = tl.zeros_like(acc)
        for program in range(head, tail + 1):
            slot = (2 * program + (program == head)).to(tl.int64)
            acc += tl.load(partial + slot * size + at, cache_modifier=".cg")
        tl.store(tickets + in_line, 0)
    return acc, is_last


@triton.jit
def raster(tile, tiles_n, tiles_m, GROUP: tl.constexpr):
    """Where a tile lies: (n, m), GROUP tiles of n side by side, so that what runs together shares its operands."""
    width = GROUP * tiles_m
    first_n = tile // width * GROUP
    group = tl.minimum(tiles_n - first_n, GROUP)
    return first_n + tile % width % group, tile % width // group


def tickets_of(device: torch.device) -> Tensor:
    """Zeros for the current stream of a device; kernels of one stream follow one another.

    Into a graph that is being captured go zeros of the launch's own, written whenever it is replayed: kept, they would
    be written by the one graph that was captured first, and other graphs may run before it, or without it.
    """
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(MAX_PROGRAMS, dtype=torch.int32, device=device)
    key = (device.index or 0, torch._C._cuda_getCurrentRawStream(device.index or 0))
    if key not in _TICKETS:
        _TICKETS[key] = torch.zeros(MAX_PROGRAMS, dtype=torch.int32, device=device)
    return _TICKETS[key]
