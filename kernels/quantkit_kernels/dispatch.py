"""Which route of a family computes a product: by a table measured on the device, by rule where none was.

    tables       dispatch/*.json of this package; *.json in `local_folder` stand in for those of the same device
    device       the table of that name, else of the same major capability the nearest, else the rule
    shape        of the weights in the table the nearest: least |log2 N/N'| + |log2 K/K'|
    rows         the first step that takes so many; a route that the device lacks leaves its rows to the next

Nothing is measured here, and nothing waits for the device. After the first call for a weight's shape a choice is a look
into a dict and a bisection.
"""

import functools
import math
import warnings
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from quantkit_kernels import nvrtc
from quantkit_kernels.catalog import gpu_families
from quantkit_kernels.dispatch_table import Shape, Steps, Table, TableError, read_table
from quantkit_kernels.family import Family, Route

SHIPPED = Path(__file__).parent / "dispatch"
MANY_ROWS = 256  # without a table: from here on multiplying by a dequantized weight is as fast, as on an H100


class Device(NamedTuple):
    """What a table is chosen by."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int


class Ladder(NamedTuple):
    """routes[i] takes up to limits[i] rows, and the last any number. source: the table's device, or "rule"."""

    limits: tuple[int, ...]
    routes: tuple[Route, ...]
    source: str

    def at(self, num_rows: int) -> Route:
        """The route for so many rows."""
        return self.routes[bisect_left(self.limits, num_rows)]


_ladders: dict[tuple[str, int, int, int], Ladder] = {}  # for the process, by `choose`


def choose(family: Family, num_rows: int, n: int, k: int, device: torch.device) -> Route:
    """The route for x [num_rows, k] and a weight [n, k] on a CUDA device."""
    index = torch.cuda.current_device() if device.index is None else device.index
    key = (family.name, n, k, index)
    ladder = _ladders.get(key)
    if ladder is None:
        ladder = _ladders[key] = ladder_of(family, n, k, device_of(index), tables())
    return ladder.at(num_rows)


def local_folder() -> Path | None:
    """Where tables measured on this machine are put to be used: they stand in for those that are shipped.

    None for a user without a home.
    """
    cache = nvrtc.cache_folder()
    return None if cache is None else cache / "dispatch"


@functools.cache
def device_of(index: int) -> Device:
    """Facts of a CUDA device, asked once."""
    found = torch.cuda.get_device_properties(index)
    return Device(found.name, (found.major, found.minor), found.multi_processor_count)


@functools.cache
def tables() -> tuple[Table, ...]:
    """Every table, read once, those of `local_folder` first."""
    families = gpu_families()
    shipped = (read_table(path, families) for path in sorted(SHIPPED.glob("*.json")))
    return (*_local_tables(families), *shipped)


def _local_tables(families: Mapping[str, Family]) -> Iterator[Table]:
    """Those that can be read; others, written by a version with other routes say, are named in a warning."""
    folder = local_folder()
    try:
        files = [] if folder is None else sorted(folder.iterdir())
    except FileNotFoundError:
        return
    except OSError as error:
        warnings.warn(f"no table of this machine is used: {error}", stacklevel=2)
        return
    for path in files:
        if path.suffix == ".json":
            try:
                yield read_table(path, families)
            except (OSError, TableError) as error:
                warnings.warn(f"a table of this machine is not used: {error}", stacklevel=2)


def ladder_of(family: Family, n: int, k: int, device: Device, tables: Iterable[Table]) -> Ladder:
    """All that `choose` says of one weight on one device."""
    table = nearest_table(family.name, device, tables)
    if table is None:
        return _ladder(_by_rule(family, device), family, device, "rule")
    shapes = table.families[family.name]
    return _ladder(shapes[nearest_shape((n, k), shapes)], family, device, table.device)


def nearest_table(family: str, device: Device, tables: Iterable[Table]) -> Table | None:
    """The device's own, else of the same major capability the nearest in minor and in multiprocessors, else None."""

    def distance(table: Table) -> tuple[bool, int, int]:
        return (
            table.device != device.name,
            abs(table.capability[1] - device.capability[1]),
            abs(table.multiprocessors - device.multiprocessors),
        )

    related = [t for t in tables if family in t.families and t.capability[0] == device.capability[0]]
    return min(related, key=distance, default=None)


def nearest_shape(shape: Shape, known: Iterable[Shape]) -> Shape:
    """The known shape whose sides are the fewest powers of two away; of several the smallest."""

    def distance(other: Shape) -> tuple[float, Shape]:
        return sum(abs(math.log2(side / of)) for side, of in zip(shape, other, strict=True)), other

    return min(known, key=distance)


def _by_rule(family: Family, device: Device) -> Steps:
    """Each route as far as it goes; those that take any number of rows up to MANY_ROWS, and the last from there."""
    steps: list[tuple[int | None, str]] = []
    for route in family.usable(1, device.capability):
        limit = route.max_rows if route.max_rows is not None else MANY_ROWS
        if not steps or limit > (steps[-1][0] or 0):
            steps.append((limit, route.name))
    return (*steps, (None, family.routes[-1].name))


def _ladder(steps: Steps, family: Family, device: Device, source: str) -> Ladder:
    """Steps whose route this device has; neighbours of one route are one."""
    usable = {route.name: route for route in family.usable(1, device.capability)}
    kept = [(limit, usable[name]) for limit, name in steps if name in usable]
    if not kept or kept[-1][0] is not None:
        kept.append((None, family.routes[-1]))
    kept = [
        step
        for step, after in zip(kept, [*kept[1:], None], strict=True)
        if after is None or step[1] is not after[1]
    ]
    limits = tuple(limit for limit, _ in kept if limit is not None)
    return Ladder(limits, tuple(route for _, route in kept), source)
