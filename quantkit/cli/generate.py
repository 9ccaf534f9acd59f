"""`quantkit generate`: one prompt, answered on the terminal as it is computed."""

import json
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from quantkit.runtime.sampling_params import SamplingParams

if TYPE_CHECKING:
    from quantkit.runtime.generate import Generated

DEFAULTS = SamplingParams()


def generate(
    model: Annotated[
        str, typer.Argument(help="A folder, a hub id, a .gguf file, or `demo`; quantized or not.")
    ],
    prompt: Annotated[str, typer.Argument(help="The user's message, or, with --raw, the start of a text.")],
    max_tokens: Annotated[int, typer.Option(help="Stop after this many tokens.")] = DEFAULTS.max_tokens,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = DEFAULTS.temperature,
    top_p: Annotated[float, typer.Option(help="Of the likeliest tokens that reach it.")] = DEFAULTS.top_p,
    top_k: Annotated[int | None, typer.Option(help="Of this many likeliest tokens.")] = DEFAULTS.top_k,
    min_p: Annotated[
        float, typer.Option(help="Of tokens this likely, relative to the best.")
    ] = DEFAULTS.min_p,
    seed: Annotated[int | None, typer.Option(help="Repeat a random answer.")] = DEFAULTS.seed,
    raw: Annotated[bool, typer.Option("--raw", help="Send the prompt without the chat template.")] = False,
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"] | None,
        typer.Option(help="Compute in it; default: the model's own."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object when done.")] = False,
) -> None:
    """Answer a prompt. The text goes to stdout as it comes, the speed to stderr."""
    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed
    )
    from quantkit.formats.checkpoint import open_checkpoint
    from quantkit.formats.source import resolve_source
    from quantkit.runtime.generate import generate as generate_tokens
    from quantkit.runtime.load import DTYPES, load_model
    from quantkit.runtime.models.families import read_spec
    from quantkit.runtime.tokenizer import load_tokenizer, stop_tokens

    checkpoint = open_checkpoint(resolve_source(model, revision=revision, announce=_to_stderr))
    read_spec(checkpoint)  # a config.json that is wrong is said to be, before the tokenizer stumbles over it
    tokenizer = load_tokenizer(checkpoint.path)
    prompt_ids = tokenizer.encode_prompt(prompt, raw=raw)
    loaded = load_model(checkpoint, dtype=None if dtype is None else DTYPES[dtype])
    tokens = generate_tokens(
        loaded, tokenizer, prompt_ids, params, stop_ids=stop_tokens(checkpoint, tokenizer)
    )
    report = _consume(tokens, len(prompt_ids), stream=not as_json)
    typer.echo(json.dumps(report) if as_json else "")
    if not as_json:
        _to_stderr(_summary(report))


def _consume(tokens: "Iterator[Generated]", num_prompt_tokens: int, *, stream: bool) -> dict[str, Any]:
    """Run to the end, print text as it comes if asked to; what happened, with times."""
    texts: list[str] = []
    token_ids: list[int] = []
    finish: str | None = None
    started = time.perf_counter()
    first = started
    for token in tokens:
        if not token_ids:
            first = time.perf_counter()
        token_ids.append(token.token_id)
        texts.append(token.text)
        finish = token.finish
        if stream:
            sys.stdout.write(token.text)
            sys.stdout.flush()
    ended = time.perf_counter()
    return {
        "text": "".join(texts),
        "token_ids": token_ids,
        "finish": finish,
        "prompt_tokens": num_prompt_tokens,
        "prefill_seconds": round(first - started, 4),
        "decode_seconds": round(ended - first, 4),
        "tokens_per_second": round((len(token_ids) - 1) / (ended - first), 2) if len(token_ids) > 1 else None,
    }


def _summary(report: dict[str, Any]) -> str:
    reasons = {"stop": "the model ended", "length": "--max-tokens reached", "context": "the context is full"}
    speed = report["tokens_per_second"]
    pace = "" if speed is None else f" at {speed} tok/s"
    return (
        f"{report['prompt_tokens']} prompt tokens in {report['prefill_seconds']:.2f} s, "
        f"{len(report['token_ids'])} new{pace}; {reasons[report['finish']]}"
    )


def _to_stderr(line: str) -> None:
    typer.echo(line, err=True)
