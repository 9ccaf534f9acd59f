"""`quantkit bench serve`: how fast a server answers under load; any server that speaks OpenAI's API."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.answer import to_stderr


class Endpoint(StrEnum):
    COMPLETIONS = "completions"
    CHAT = "chat"


def serve(
    url: Annotated[str, typer.Option(help="Of the server, with /v1 or without.")] = "http://127.0.0.1:8000",
    rate: Annotated[
        float | None, typer.Option(help="Requests a second, at random times (a Poisson process).")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Requests under way at any time, instead of a rate.")
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests in all.")] = 100,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of each random prompt; of a chat, words.")
    ] = 512,
    output_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 128,
    prompts: Annotated[
        Path | None, typer.Option(help="A prompt on each line of this file, instead of random ones.")
    ] = None,
    endpoint: Annotated[Endpoint, typer.Option(help="Which one to load.")] = Endpoint.COMPLETIONS,
    model: Annotated[str | None, typer.Option(help="As the server calls it.  [default: its first]")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="OPENAI_API_KEY", help="If the server wants one.")
    ] = None,
    slo: Annotated[
        str | None, typer.Option(help="What a good answer keeps, like ttft=200ms,tpot=30ms,e2e=5s.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0)] = 0.0,
    stop_at_eos: Annotated[
        bool, typer.Option("--stop-at-eos", help="Let the model end answers; for servers without ignore_eos.")
    ] = False,
    vocab_size: Annotated[int, typer.Option(min=1, help="Ids of random prompts are below.")] = 32000,
    timeout: Annotated[float, typer.Option(help="Seconds for one request.")] = 600.0,
    seed: Annotated[int, typer.Option(help="Of prompts and times.")] = 0,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw latencies and throughput: .png, .svg or .pdf.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Load a server: times to the first token and between tokens, tokens a second, goodput, errors."""
    from quantkit.bench.load_plot import check_plot, write_plot
    from quantkit.bench.load_report import report_of
    from quantkit.bench.serve import LoadSettings, bench_server
    from quantkit.bench.slo import parse_slo
    from quantkit.bench.sse_client import parse_server
    from quantkit.cli.bench_serve_display import show

    settings = LoadSettings(
        endpoint=endpoint.value,
        num_requests=requests,
        num_prompt_tokens=prompt_tokens,
        num_output_tokens=output_tokens,
        prompts_file=prompts,
        vocab_size=vocab_size,
        temperature=temperature,
        ignore_eos=not stop_at_eos,
        rate=rate,
        concurrency=concurrency,
        timeout=timeout,
        seed=seed,
    )
    objective = None if slo is None else parse_slo(slo)
    if plot is not None:
        check_plot(plot)
    run = bench_server(parse_server(url, api_key), model, settings, announce=to_stderr)
    report = report_of(run, objective)
    if plot is not None:
        load = f"{rate:g} requests/s" if rate is not None else f"{concurrency} requests at a time"
        write_plot(plot, run.outcomes, objective, f"{url}: {load}")
        to_stderr(f"{plot}: written")
    if as_json:
        load_of = {"url": url, "rate": rate, "concurrency": concurrency, "endpoint": endpoint.value}
        typer.echo(json.dumps(load_of | report.as_dict(), indent=2))
    else:
        show(report)
