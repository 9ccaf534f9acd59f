"""How timings of kernels look on a terminal: ceilings, a line for each family, rows and route, and what is missing."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from quantkit.bench.ceilings import Ceilings
from quantkit.bench.kernels import KernelReport, Timing

Line = tuple[str, int, str]  # family, rows, route
LEGEND = (
    "us: of all shapes together; ceiling: share of what moving or multiplying takes at best, whichever is longer; "
    "over bf16: speed; *: the fastest"
)


def show(report: KernelReport, console: Console) -> None:
    """Print everything."""
    unit = 1.0 if report.is_gpu else 1e3
    console.print(f"{report.device}, torch {report.torch}: {_ceilings(report.ceilings, unit)}")
    console.print(_table(report.timings, unit))
    console.print(LEGEND)
    for missing in report.missing:
        console.print(f"{missing.family} {missing.route}: not measured, needs {missing.needs}")


def _ceilings(best: Ceilings, unit: float) -> str:
    rates = {"read": best.read, "copy": best.copy, "bf16": best.bf16, "fp8": best.fp8, "int8": best.int8}
    per_second = _units(unit)
    words = {"read": per_second[0], "copy": per_second[0]}
    known = ((name, rate) for name, rate in rates.items() if rate is not None)
    return ", ".join(f"{name} {_rate(unit * rate)} {words.get(name, per_second[1])}" for name, rate in known)


def _units(unit: float) -> tuple[str, str]:
    return ("TB/s", "TFLOP/s") if unit == 1 else ("GB/s", "GFLOP/s")


def _table(timings: Sequence[Timing], unit: float) -> Table:
    lines = _lines(timings)
    baseline_us = {rows: _us(of) for (family, rows, _), of in lines.items() if family == timings[0].family}
    shapes = list(dict.fromkeys(timing.shape.name for timing in timings))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("family", "rows", "route"):
        table.add_column(column, no_wrap=True)
    for column in ("us", *(shapes if len(shapes) > 1 else ()), *_units(unit), "ceiling", "over bf16"):
        table.add_column(column, justify="right")
    family = timings[0].family
    for (name, rows, route), found in lines.items():
        if name != family:
            table.add_section()
            family = name
        is_fastest = _us(found) == min(_us(of) for line, of in lines.items() if line[:2] == (name, rows))
        cells = _cells(found, unit, with_shapes=len(shapes) > 1)
        table.add_row(
            name,
            f"{rows:>4}",
            f"{route} *" if is_fastest else route,
            *cells,
            f"{baseline_us[rows] / _us(found):.2f}",
        )
    return table


def _lines(timings: Sequence[Timing]) -> dict[Line, list[Timing]]:
    """Timings of all shapes by family, in their order, then by rows, then by route."""
    order = list(dict.fromkeys(timing.family for timing in timings))
    lines: dict[Line, list[Timing]] = {}
    for timing in sorted(timings, key=lambda timing: (order.index(timing.family), timing.num_rows)):
        lines.setdefault((timing.family, timing.num_rows, timing.route), []).append(timing)
    return lines


def _cells(timings: Sequence[Timing], unit: float, *, with_shapes: bool) -> list[str]:
    us = _us(timings)
    rates = (sum(t.num_bytes for t in timings) / us / 1e6, sum(t.num_operations for t in timings) / us / 1e6)
    return [
        _digits(us),
        *([_digits(timing.us) for timing in timings] if with_shapes else []),
        *(_rate(unit * rate) for rate in rates),
        f"{sum(t.least_us for t in timings) / us:.0%}",
    ]


def _us(timings: Sequence[Timing]) -> float:
    return sum(timing.us for timing in timings)


def _digits(us: float) -> str:
    return f"{us:.1f}" if us < 1000 else f"{us:.0f}"


def _rate(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}"
