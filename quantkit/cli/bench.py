"""`quantkit bench`: what this machine can do at most, how much of it the kernels take, how fast the engine answers."""

import json
from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.bench_engine import cost, latency, throughput
from quantkit.cli.bench_serve import serve
from quantkit.errors import BenchError

bench = typer.Typer(name="bench", help="Measure this machine.", no_args_is_help=True)


@bench.callback()
def root() -> None:
    """Measure this machine."""


bench.command("latency")(latency)
bench.command("throughput")(throughput)
bench.command("cost")(cost)
bench.command("serve")(serve)


@bench.command("kernels")
def kernels(
    shape: Annotated[
        list[str] | None,
        typer.Option(
            help="A layer, 8b or 70b, or a weight, N,K; may be repeated.  [default: 8b; on a CPU 4096,4096]"
        ),
    ] = None,
    rows: Annotated[str | None, typer.Option(help="Numbers of rows of x, like 1,8,16.")] = None,
    families: Annotated[str | None, typer.Option(help="Only these, like w4a16,w8a16.")] = None,
    write: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Put the fastest routes into this dispatch table.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Time products with quantized weights, on the GPU or else on the CPU, against bf16 and against the ceilings."""
    import torch

    from quantkit.bench.contenders import family_names
    from quantkit.bench.dispatch_file import MIN_ROWS, update_table
    from quantkit.bench.kernels import ROWS, SHAPE, bench_kernels
    from quantkit.bench.shapes import parse_names, parse_rows, parse_shapes
    from quantkit.cli.bench_display import show
    from quantkit.cli.output import table_console

    device = (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
    known = family_names(device)
    names = known if families is None else parse_names(families, known)
    num_rows = ROWS[device.type] if rows is None else parse_rows(rows)
    shapes = tuple(
        dict.fromkeys(found for text in shape or [SHAPE[device.type]] for found in parse_shapes(text))
    )
    if write is not None:
        _check_write(write, num_rows, MIN_ROWS, device.type)
    if device.type == "cpu":
        typer.echo("no GPU: these are the kernels of the CPU", err=True)
    with torch.inference_mode():
        report = bench_kernels(
            device, shapes, num_rows, names, on_family=lambda name: typer.echo(name, err=True)
        )
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=2))
    else:
        show(report, table_console())
    if write is not None:
        from quantkit_kernels.catalog import gpu_families
        from quantkit_kernels.dispatch import device_of, local_folder

        update_table(write, device_of(device.index or 0), report.torch, report.timings, gpu_families())
        folder = local_folder() or "$QUANTKIT_CACHE/kernels/dispatch"
        typer.echo(f"{write}: written; tables in {folder} are used on this machine", err=True)


def _check_write(path: Path, rows: tuple[int, ...], min_rows: int, device_type: str) -> None:
    """Before anything is measured."""
    if device_type == "cpu":
        raise BenchError(f"--write {path}: there is no GPU to measure routes on", fix="leave --write away")
    if rows[-1] < min_rows:
        raise BenchError(
            f"--write {path} with up to {rows[-1]} rows: a table says what to do with any number",
            fix=f"leave --rows away, or have it reach {min_rows}",
        )
    if not path.parent.is_dir():
        raise BenchError(f"--write {path}: {path.parent} is no folder", fix="give a folder that exists")
