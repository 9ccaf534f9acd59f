"""`quantkit eval`: what candidates lost against their original."""

import json
import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantkit.cli.model_options import DEFAULTS, Device, KVCacheDtype
from quantkit.runtime.settings import DtypeName

if TYPE_CHECKING:
    from quantkit.evaluation import EvalReport

Task = partial(typer.Option, rich_help_panel="Tasks")


def eval_models(
    reference: Annotated[
        str, typer.Argument(help="The original: a folder, a hub id, a .gguf file, or `demo`.")
    ],
    candidates: Annotated[list[str], typer.Argument(help="Checkpoints made from it.")],
    data: Annotated[
        str, typer.Option(help="Text: a file or folder (txt, jsonl, parquet), hf:dataset, or `docs`.")
    ] = "docs",
    windows: Annotated[int, typer.Option(help="Windows of text, spread evenly over it.")] = 24,
    length: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    device: Device = DEFAULTS.device,
    dtype: Annotated[
        DtypeName | None,
        typer.Option(help="Compute candidates in it; default: on a GPU the model's own, on a CPU float32."),
    ] = DEFAULTS.dtype,
    kv_cache_dtype: KVCacheDtype = DEFAULTS.kv_cache_dtype,
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
    max_kl: Annotated[float | None, typer.Option(help="Gate: mean KL divergence, in nats.")] = None,
    max_ppl_increase: Annotated[
        str | None, typer.Option(help="Gate: perplexity over the original's, in percent.", metavar="P%")
    ] = None,
    min_top1: Annotated[
        float | None, typer.Option(help="Gate: how often both find the same token likeliest, 0 to 1.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Measure what candidates lost against their original; exit code 1 if a gate fails."""
    from rich.console import Console

    from quantkit.cli.eval_display import Display, show
    from quantkit.evaluation import Gates, describe_failure, evaluate, parse_percent

    gates = Gates(
        max_kl=max_kl,
        max_ppl_increase=None if max_ppl_increase is None else parse_percent(max_ppl_increase),
        min_top1=min_top1,
    )
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
            tasks=[name.strip() for name in (tasks or "").split(",") if name.strip()],
            limit=limit,
            num_fewshot=num_fewshot,
            apply_chat_template=apply_chat_template,
            samples=samples,
            gates=gates,
            listener=display,
        )
    _fill_cards(report)
    if as_json:
        typer.echo(json.dumps(_finite(report.to_json()), indent=2, allow_nan=False))
    else:
        show(report)
    for result in report.gates:
        if not result.passed:
            typer.echo(describe_failure(result), err=True)
    return 0 if report.passed else 1


def _fill_cards(report: "EvalReport") -> None:
    from quantkit.evaluation import fill_card

    for candidate in report.candidates:
        try:
            fill_card(report, candidate)
        except (OSError, UnicodeDecodeError) as error:
            line = f"{candidate.path}: the figures are not in its README.md, which cannot be rewritten"
            typer.echo(f"{line} ({error})", err=True)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
