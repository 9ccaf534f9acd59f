"""`quantkit generate`: one prompt, answered on the terminal as it is computed."""

import json
from typing import Annotated

import typer

from quantkit.cli.answer import Answer, to_stderr
from quantkit.cli.model_options import DEFAULTS, Device, Dtype, KVCacheDtype, MaxModelLen, Model, Revision
from quantkit.runtime.sampling_params import SamplingParams

SAMPLING = SamplingParams()

MaxTokens = Annotated[int, typer.Option(help="Stop after this many tokens.")]
Temperature = Annotated[float, typer.Option(help="0: always the likeliest token.")]
TopP = Annotated[float, typer.Option(help="Of the likeliest tokens that reach it.")]
TopK = Annotated[int | None, typer.Option(help="Of this many likeliest tokens.")]
MinP = Annotated[float, typer.Option(help="Of tokens this likely, relative to the best.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1: tokens that were there become less likely.")]
Seed = Annotated[int | None, typer.Option(help="Repeat a random answer.")]


def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The user's message, or, with --raw, the start of a text.")],
    max_tokens: MaxTokens = SAMPLING.max_tokens,
    temperature: Temperature = SAMPLING.temperature,
    top_p: TopP = SAMPLING.top_p,
    top_k: TopK = SAMPLING.top_k,
    min_p: MinP = SAMPLING.min_p,
    repetition_penalty: RepetitionPenalty = SAMPLING.repetition_penalty,
    seed: Seed = SAMPLING.seed,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Send the prompt without the chat template.")] = False,
    dtype: Dtype = DEFAULTS.dtype,
    device: Device = DEFAULTS.device,
    kv_cache_dtype: KVCacheDtype = DEFAULTS.kv_cache_dtype,
    max_model_len: MaxModelLen = DEFAULTS.max_model_len,
    revision: Revision = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object when done.")] = False,
) -> None:
    """Answer a prompt. The text goes to stdout as it comes, the speed to stderr."""
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=tuple(stop or ()),
    )
    from quantkit.runtime.llm import LLM

    llm = LLM(
        model,
        revision=revision,
        announce=to_stderr,
        dtype=dtype,
        device=device,
        kv_cache_dtype=kv_cache_dtype,
        max_model_len=max_model_len,
        max_num_seqs=1,
    )
    prompt_ids = llm.tokenizer.encode_prompt(prompt, raw=raw)
    answer = Answer(len(prompt_ids), writes=not as_json)
    for output in llm.stream(prompt_ids, params):
        answer.add(output)
    answer.check()
    typer.echo(json.dumps(answer.as_dict()) if as_json else "")
    if not as_json:
        to_stderr(answer.summary())
