"""Where tables go: stdout, which a file or a pipe makes wide enough for the names of tensors; and a table of times."""

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from quantkit.bench.arrivals import PERCENTILES

PIPE_WIDTH = 120


def table_console() -> Console:
    """Stdout; as wide as the terminal, or elsewhere at least PIPE_WIDTH columns."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, PIPE_WIDTH)
    return console


def times_table(times_ms: Mapping[str, Mapping[int, float] | None]) -> Table:
    """A line for each kind of time that was measured, at PERCENTILES."""
    table = Table("ms", *(f"p{percent}" for percent in PERCENTILES), box=None, pad_edge=False)
    for name, times in times_ms.items():
        if times is not None:
            table.add_row(name, *(f"{times[percent]:.2f}" for percent in PERCENTILES))
    return table
