"""`quantkit eval`: what candidates lost against their original."""

import json
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from quantkit.cli.model_options import DEFAULTS, Device, KVCacheDtype
from quantkit.errors import EvaluationError, OutputError
from quantkit.runtime.settings import DtypeName

if TYPE_CHECKING:
    from quantkit.evaluation import EvalReport

NUM_EXAMPLES = 6  # of the worst positions on the page
Task = partial(typer.Option, rich_help_panel="Tasks")
Gate = partial(typer.Option, rich_help_panel="Gates: exit code 1 if one is not met")
Output = partial(typer.Option, rich_help_panel="Reports")


def eval_models(
    reference: Annotated[
        str, typer.Argument(help="The original: a folder, a hub id, a .gguf file, or `demo`.")
    ],
    candidates: Annotated[
        list[str],
        typer.Argument(
            help="Checkpoints made from it, GPTQ and AWQ too; `bnb:nf4` and `bnb:int8` are made here."
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option(help="Text: a file or folder (txt, jsonl, parquet), hf:dataset, or `docs` (default)."),
    ] = None,
    windows: Annotated[
        int | None, typer.Option(help="Windows of text, spread evenly over it; default: 24.")
    ] = None,
    length: Annotated[int | None, typer.Option(help="Tokens per window; default: 512.")] = None,
    device: Device = DEFAULTS.device,
    dtype: Annotated[
        DtypeName | None,
        typer.Option(help="Compute candidates in it; default: on a GPU the model's own, on a CPU float32."),
    ] = DEFAULTS.dtype,
    kv_cache_dtype: KVCacheDtype = DEFAULTS.kv_cache_dtype,
    backend: Annotated[
        Literal["auto", "quantkit", "transformers"],
        typer.Option(help="What runs the models; auto: quantkit, or transformers for what it does not have."),
    ] = "auto",
    where: Annotated[
        bool,
        typer.Option(
            "--where", help="Map the loss to linears, positions and kinds of tokens, by swapping linears."
        ),
    ] = False,
    tasks: Annotated[
        str | None,
        Task(
            help="Tasks, groups and tags of lm-eval, with commas between; `probes` need no download.",
            metavar="A,B",
        ),
    ] = None,
    limit: Annotated[int | None, Task(help="Items of each task, from the first.", min=1)] = None,
    num_fewshot: Annotated[int | None, Task(help="Examples in front of each item.", min=0)] = None,
    apply_chat_template: Annotated[
        bool, Task("--apply-chat-template", help="Ask in the model's chat format.")
    ] = False,
    samples: Annotated[
        Path | None,
        Task(help="Where answers are logged, and found again; default: in the cache.", metavar="FOLDER"),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(help="What to run and which gates hold: quick, standard, full, or a YAML file."),
    ] = None,
    max_kl: Annotated[float | None, Gate(help="Mean KL divergence, in nats.")] = None,
    max_ppl_increase: Annotated[
        str | None, Gate(help="Perplexity over the original's, in percent.", metavar="P%")
    ] = None,
    min_top1: Annotated[
        float | None, Gate(help="How often both find the same token likeliest, 0 to 1.")
    ] = None,
    min_recovery: Annotated[
        str | None, Gate(help="Score of every task, in percent of the original's.", metavar="P%")
    ] = None,
    page: Annotated[
        Path | None,
        Output("--report", help="All of it as one HTML page, with the worst positions.", metavar="FILE.html"),
    ] = None,
    junit: Annotated[Path | None, Output(help="Gates as JUnit XML, for CI.", metavar="FILE.xml")] = None,
    markdown: Annotated[
        Path | None, Output(help="A summary in GitHub-flavoured Markdown.", metavar="FILE.md")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Measure what candidates lost against their original; exit code 1 if a gate fails."""
    from rich.console import Console

    from quantkit.cli.eval_display import Display, show
    from quantkit.evaluation import (
        Gates,
        describe_failure,
        evaluate,
        parse_percent,
        write_junit,
        write_markdown,
        write_page,
    )

    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if tasks is not None and not names:
        raise EvaluationError(f"--tasks {tasks!r}: names no task", fix="give one, such as --tasks probes")
    gates = Gates(
        max_kl=max_kl,
        max_ppl_increase=parse_percent(max_ppl_increase, "--max-ppl-increase"),
        min_top1=min_top1,
        min_recovery=parse_percent(min_recovery, "--min-recovery"),
    )
    written = ((write_page, page), (write_junit, junit), (write_markdown, markdown))
    outputs = [(write, path) for write, path in written if path]
    for _, path in outputs:
        _check_place(path)
    with Display(Console(stderr=True)) as display:
        report = evaluate(
            reference,
            candidates,
            data=data,
            windows=windows,
            length=length,
            device=device,
            dtype=dtype,
            kv_cache_dtype=kv_cache_dtype,
            backend=backend,
            where=where,
            examples=0 if page is None else NUM_EXAMPLES,
            tasks=names,
            limit=limit,
            num_fewshot=num_fewshot,
            apply_chat_template=apply_chat_template,
            samples=samples,
            suite=suite,
            gates=gates,
            listener=display,
        )
    report = replace(report, command=shlex.join(["quantkit", *sys.argv[1:]]))
    _fill_cards(report)
    if as_json:
        typer.echo(json.dumps(_finite(report.to_json()), indent=2, allow_nan=False))
    else:
        show(report)
    for result in report.gates:
        if not result.passed:
            typer.echo(describe_failure(result), err=True)
    _write_all(report, outputs)
    return 0 if report.passed else 1


def _fill_cards(report: "EvalReport") -> None:
    from quantkit.evaluation import fill_card

    for candidate in report.candidates:
        try:
            fill_card(report, candidate)
        except (OSError, UnicodeDecodeError) as error:
            line = f"{candidate.path}: the figures are not in its README.md, which cannot be rewritten"
            typer.echo(f"{line} ({error})", err=True)


def _check_place(path: Path) -> None:
    """Raise OutputError, before hours of work, for a file without a folder, and for what is none.

    A report replaces what has its name, which of /dev/stdout, a link to whatever that is now, would be the link.
    """
    if path.is_dir():
        raise OutputError(f"{path}: is a folder", fix="give the name of a file")
    is_of_process = path.is_symlink() and path.readlink().is_relative_to("/proc")
    if is_of_process or (path.exists() and not path.is_file()):
        raise OutputError(f"{path}: is a pipe or a device, not a file", fix="give the name of a file")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: there is no folder {path.parent}", fix=f"mkdir -p {path.parent}")


def _write_all(
    report: "EvalReport", outputs: "Sequence[tuple[Callable[[EvalReport, Path], None], Path]]"
) -> None:
    """Write what can be written. Raises OutputError, after that, for what cannot."""
    problems = []
    for write, path in outputs:
        try:
            write(report, path)
        except OSError as error:
            problems.append(f"{path}: {error.strerror or error}")
    if problems:
        raise OutputError(
            f"not written: {'; '.join(problems)}",
            fix="make room, or name other places; the same command takes what was computed from the cache",
        )


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
