"""From timings to a dispatch table, and into its file: what was measured replaces what stood there, the rest stays."""

import datetime
from collections.abc import Iterable, Mapping
from pathlib import Path

from quantkit.bench.kernels import Timing
from quantkit.errors import BenchError
from quantkit.formats.durable import write_atomically
from quantkit_kernels.dispatch import Device
from quantkit_kernels.dispatch_table import Steps, Table, TableError, read_table
from quantkit_kernels.family import Family

WORTH = 0.98  # a route takes over where it needs less than this much of the time of the one before
MIN_ROWS = 2048  # a table says what to do with any number of rows, so it has to have seen many


def steps_from(timings: Iterable[Timing], family: Family) -> Steps:
    """Of one family and shape: at each number of rows that was measured the fastest, and on to the next below."""
    by_rows: dict[int, dict[str, float]] = {}
    for timing in timings:
        by_rows.setdefault(timing.num_rows, {})[timing.route] = timing.us
    unlimited = {route.name for route in family.routes if route.max_rows is None}
    steps: list[tuple[int | None, str]] = []
    for num_rows, found in sorted(by_rows.items()):
        is_last = num_rows == max(by_rows)
        able = {name: us for name, us in found.items() if not is_last or name in unlimited}
        fastest = min(able, key=lambda name: able[name])
        if steps and steps[-1][1] in able and able[fastest] > WORTH * able[steps[-1][1]]:
            fastest = steps[-1][1]
        if steps and steps[-1][1] == fastest:
            steps.pop()
        steps.append((None if is_last else num_rows, fastest))
    return tuple(steps)


def update_table(
    path: Path, device: Device, torch_version: str, timings: Iterable[Timing], families: Mapping[str, Family]
) -> Table:
    """Put timings of these families into the file, whole or not at all."""
    old = _existing(path, device, families)
    measured: dict[str, dict[tuple[int, int], list[Timing]]] = {}
    for timing in timings:
        if timing.family in families:
            of_family = measured.setdefault(timing.family, {})
            of_family.setdefault((timing.shape.n, timing.shape.k), []).append(timing)
    merged = {name: dict(shapes) for name, shapes in (old.families if old else {}).items()}
    for name, shapes in measured.items():
        steps = {shape: steps_from(found, families[name]) for shape, found in shapes.items()}
        merged.setdefault(name, {}).update(steps)
    table = Table(
        device=device.name,
        capability=device.capability,
        multiprocessors=device.multiprocessors,
        measured=f"{datetime.date.today().isoformat()}, torch {torch_version}",
        families=merged,
    )
    write_atomically(path, table.as_json().encode())
    return table


def _existing(path: Path, device: Device, families: Mapping[str, Family]) -> Table | None:
    if not path.exists():
        return None
    try:
        table = read_table(path, families)
    except TableError as error:
        raise BenchError(str(error), fix="repair it, or give --write the name of a new file") from error
    if table.device != device.name:
        raise BenchError(
            f"{path}: a table of {table.device}; this is {device.name}",
            fix="give --write the name of a new file",
        )
    return table
