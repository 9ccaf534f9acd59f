"""`quantkit chat`: a conversation on the terminal."""

import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from quantkit.cli.answer import Answer, to_stderr
from quantkit.cli.generate import (
    SAMPLING,
    MaxTokens,
    MinP,
    RepetitionPenalty,
    Seed,
    Temperature,
    TopK,
    TopP,
)
from quantkit.cli.model_options import DEFAULTS, Device, Dtype, KVCacheDtype, MaxModelLen, Model, Revision
from quantkit.errors import GenerationError
from quantkit.runtime.sampling_params import SamplingParams

if TYPE_CHECKING:
    from quantkit.runtime.llm import LLM

HELP = "a line is a message; /reset begins anew, /exit or the end of input leaves, Ctrl-C stops an answer"


def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="What the model is told before everything.")] = None,
    max_tokens: MaxTokens = 1024,
    temperature: Temperature = SAMPLING.temperature,
    top_p: TopP = SAMPLING.top_p,
    top_k: TopK = SAMPLING.top_k,
    min_p: MinP = SAMPLING.min_p,
    repetition_penalty: RepetitionPenalty = SAMPLING.repetition_penalty,
    seed: Seed = SAMPLING.seed,
    dtype: Dtype = DEFAULTS.dtype,
    device: Device = DEFAULTS.device,
    kv_cache_dtype: KVCacheDtype = DEFAULTS.kv_cache_dtype,
    max_model_len: MaxModelLen = DEFAULTS.max_model_len,
    revision: Revision = None,
) -> None:
    """Talk with a model. Answers go to stdout as they come; what was said before is not computed again."""
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
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
    opening = [] if system is None else [{"role": "system", "content": system}]
    llm.tokenizer.encode_chat([*opening, {"role": "user", "content": "?"}])  # a base model is told now
    to_stderr(HELP)
    messages = list(opening)
    while (line := _read_line()) not in (None, "/exit"):
        if line == "/reset":
            messages = list(opening)
        elif line:
            asked = [*messages, {"role": "user", "content": str(line)}]
            text = _answer(llm, asked, params)
            if text is not None:
                messages = [*asked, {"role": "assistant", "content": text}]


def _answer(llm: "LLM", messages: list[dict[str, str]], params: SamplingParams) -> str | None:
    """Print an answer; its text, or None where there was none: the conversation is too long."""
    try:
        prompt_ids = llm.tokenizer.encode_chat(messages)
        answer = Answer(len(prompt_ids), writes=True)
        with suppress(KeyboardInterrupt):  # what has been said stays
            for output in llm.stream(prompt_ids, params):
                answer.add(output)
    except GenerationError as error:
        to_stderr(f"error: {error}, or begin anew with /reset")
        return None
    typer.echo("")
    to_stderr(answer.summary())
    return answer.text


def _read_line() -> str | None:
    """The next message; None at the end of input."""
    if sys.stdin.isatty():
        sys.stderr.write("> ")
        sys.stderr.flush()
    line = sys.stdin.readline()
    return line.strip() if line else None
