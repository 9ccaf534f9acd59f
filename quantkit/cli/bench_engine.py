"""`quantkit bench latency`, `throughput`, `cost`: how fast a checkpoint answers here, and what that costs."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantkit.bench.cost import Cost, Prices, cost_of
from quantkit.cli.answer import to_stderr
from quantkit.cli.model_options import (
    DEFAULTS,
    Device,
    Dtype,
    GpuMemoryFraction,
    KVCacheDtype,
    MaxModelLen,
    MaxNumBatchedTokens,
    MaxNumSeqs,
    Model,
    Revision,
)
from quantkit.errors import BenchError
from quantkit.runtime.settings import EngineSettings

if TYPE_CHECKING:
    from quantkit.bench.engine import EngineReport

Requests = Annotated[int, typer.Option(min=1, help="Requests, all submitted at once.")]
PromptTokens = Annotated[int, typer.Option(min=1, help="Tokens of each random prompt.")]
OutputTokens = Annotated[int, typer.Option(min=1, help="Tokens of each answer.")]
Prompts = Annotated[
    Path | None, typer.Option(help="A prompt on each line of this file, instead of random ones.")
]
Repeats = Annotated[int, typer.Option(min=1, help="Runs; the fastest counts.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def latency(
    model: Model,
    prompt_tokens: PromptTokens = 512,
    output_tokens: OutputTokens = 128,
    prompts: Prompts = None,
    repeats: Repeats = 3,
    dtype: Dtype = DEFAULTS.dtype,
    device: Device = DEFAULTS.device,
    kv_cache_dtype: KVCacheDtype = DEFAULTS.kv_cache_dtype,
    max_model_len: MaxModelLen = DEFAULTS.max_model_len,
    gpu_memory_fraction: GpuMemoryFraction = DEFAULTS.gpu_memory_fraction,
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """One request alone: time to the first token, and between tokens."""
    report = _run(
        model, revision, 1, prompt_tokens, output_tokens, prompts, repeats,
        dtype=dtype,
        device=device,
        kv_cache_dtype=kv_cache_dtype,
        max_model_len=max_model_len,
        max_num_seqs=1,
        gpu_memory_fraction=gpu_memory_fraction,
    )  # fmt: skip
    _print(report, as_json=as_json)


def throughput(
    model: Model,
    requests: Requests = 64,
    prompt_tokens: PromptTokens = 512,
    output_tokens: OutputTokens = 128,
    prompts: Prompts = None,
    repeats: Repeats = 3,
    dtype: Dtype = DEFAULTS.dtype,
    device: Device = DEFAULTS.device,
    kv_cache_dtype: KVCacheDtype = DEFAULTS.kv_cache_dtype,
    max_model_len: MaxModelLen = DEFAULTS.max_model_len,
    max_num_seqs: MaxNumSeqs = DEFAULTS.max_num_seqs,
    max_num_batched_tokens: MaxNumBatchedTokens = DEFAULTS.max_num_batched_tokens,
    gpu_memory_fraction: GpuMemoryFraction = DEFAULTS.gpu_memory_fraction,
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Many requests at once: tokens a second, of decode alone and of everything."""
    report = _run(
        model, revision, requests, prompt_tokens, output_tokens, prompts, repeats,
        dtype=dtype,
        device=device,
        kv_cache_dtype=kv_cache_dtype,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        gpu_memory_fraction=gpu_memory_fraction,
    )  # fmt: skip
    _print(report, as_json=as_json)


def cost(
    model: Model,
    gpu_price: Annotated[float, typer.Option(min=0, help="Of this machine, for an hour.")],
    api_price_in: Annotated[float, typer.Option(min=0, help="Of an API, for a million tokens of prompts.")],
    api_price_out: Annotated[float, typer.Option(min=0, help="Of an API, for a million tokens of answers.")],
    requests: Requests = 256,
    prompt_tokens: PromptTokens = 512,
    output_tokens: OutputTokens = 128,
    prompts: Prompts = None,
    repeats: Repeats = 1,
    dtype: Dtype = DEFAULTS.dtype,
    device: Device = DEFAULTS.device,
    kv_cache_dtype: KVCacheDtype = DEFAULTS.kv_cache_dtype,
    max_model_len: MaxModelLen = DEFAULTS.max_model_len,
    gpu_memory_fraction: GpuMemoryFraction = DEFAULTS.gpu_memory_fraction,
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Build or buy: tokens for the money at the measured speed, and from which volume on this machine is cheaper."""
    prices = Prices(gpu_price, api_price_in, api_price_out)
    if not (gpu_price > 0 and api_price_in + api_price_out > 0):
        raise BenchError("a price of nothing leaves nothing to compare", fix="give prices above 0")
    report = _run(
        model, revision, requests, prompt_tokens, output_tokens, prompts, repeats,
        dtype=dtype,
        device=device,
        kv_cache_dtype=kv_cache_dtype,
        max_model_len=max_model_len,
        gpu_memory_fraction=gpu_memory_fraction,
    )  # fmt: skip
    speed = report.speed
    found = cost_of(
        prices,
        num_prompt_tokens=speed.num_prompt_tokens / speed.num_requests,
        num_output_tokens=speed.num_output_tokens / speed.num_requests,
        request_rate=speed.num_requests / speed.seconds,
    )
    if as_json:
        typer.echo(json.dumps(report.as_dict() | {"cost": found._asdict()}, indent=2))
    else:
        typer.echo(f"{report.device}: {speed.num_requests / speed.seconds:.2f} requests/s")
        typer.echo(_cost_lines(found))


def _run(
    model: str,
    revision: str | None,
    num_requests: int,
    num_prompt_tokens: int,
    num_output_tokens: int,
    prompts_file: Path | None,
    repeats: int,
    **settings: Any,
) -> "EngineReport":
    """settings: of the engine, beside those that all of these verbs share."""
    chosen = EngineSettings(**settings, prefix_caching=False)
    from quantkit.bench.engine import bench_engine

    return bench_engine(
        model,
        chosen,
        revision=revision,
        num_requests=num_requests,
        num_prompt_tokens=num_prompt_tokens,
        num_output_tokens=num_output_tokens,
        prompts_file=prompts_file,
        repeats=repeats,
        announce=to_stderr,
    )


def _print(report: "EngineReport", *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=2))
        return
    from quantkit.cli.bench_engine_display import show

    show(report)


def _cost_lines(cost: Cost) -> str:
    lines = [
        f"a request costs {cost.own_request:.3g} here when the machine is busy, {cost.api_request:.3g} at the API",
        f"{cost.tokens_per_unit:,.0f} tokens for a unit of money; "
        f"at most {cost.requests_per_month:,.0f} requests a month",
    ]
    if cost.break_even_requests is None or cost.break_even_load is None:
        lines.append("the API is cheaper at any volume: even a busy machine costs more")
    else:
        lines.append(
            f"this machine is cheaper from {cost.break_even_requests:,.0f} requests a month on, "
            f"{cost.break_even_load:.1%} of what it can do"
        )
    return "\n".join(lines)
