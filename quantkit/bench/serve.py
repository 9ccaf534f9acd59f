"""How fast a server answers: builds the requests, tries one, then sends the load."""

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from quantkit.bench.load import Run, run_load
from quantkit.bench.prompts import prompts_of_file, random_prompts, random_texts
from quantkit.bench.sse_client import Server, get_json, stream
from quantkit.errors import BenchError

Endpoint = Literal["completions", "chat"]
PATHS: dict[Endpoint, str] = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
MODELS = "/v1/models"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSettings:
    """What is asked, and how often. rate: requests a second, as a Poisson process; or else concurrency: under way.

    prompts_file: a prompt on each line, taken in turn; None: num_prompt_tokens random ones, ids below vocab_size, or
    for a chat about as many random words. ignore_eos: answers are exactly num_output_tokens long, where the server
    knows that field. timeout: seconds for one request.
    """

    endpoint: Endpoint = "completions"
    num_requests: int = 100
    num_prompt_tokens: int = 512
    num_output_tokens: int = 128
    prompts_file: Path | None = None
    vocab_size: int = 32000
    temperature: float = 0.0
    ignore_eos: bool = True
    rate: float | None = None
    concurrency: int | None = None
    timeout: float = 600.0
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.rate is None) == (self.concurrency is None):
            raise BenchError(
                "the load needs either a rate or a concurrency",
                fix="give --rate 4 (requests a second) or --concurrency 16 (always so many under way)",
            )
        for name, value in (("rate", self.rate), ("timeout", self.timeout)):
            if value is not None and not 0 < value < float("inf"):
                raise BenchError(f"--{name} {value} makes no sense", fix="give a number above 0")


def bench_server(
    server: Server, model: str | None, settings: LoadSettings, *, announce: Callable[[str], None]
) -> Run:
    """Send the load. model: as the server calls it; None: the first that it lists.

    Raises BenchError if the server does not answer the request that is sent ahead of all others.
    """
    return asyncio.run(_bench(server, model, settings, announce))


async def _bench(
    server: Server, model: str | None, settings: LoadSettings, announce: Callable[[str], None]
) -> Run:
    if model is None:
        model = _first_model(await get_json(server, MODELS, settings.timeout))
    ahead, *bodies = request_bodies(model, settings, count=settings.num_requests + 1)
    path = PATHS[settings.endpoint]
    answer = await stream(server, path, ahead, settings.timeout)
    if answer.problem is not None:
        raise BenchError(
            f"{server.address}{server.path}{path}: {answer.problem.kind}: {answer.problem.message}",
            fix="check --url, --endpoint and the prompts; --stop-at-eos for a server that knows no ignore_eos",
        )
    announce(f"{model} answers; sending {len(bodies)} requests")
    return await run_load(
        server,
        path,
        bodies,
        rate=settings.rate,
        concurrency=settings.concurrency,
        timeout=settings.timeout,
        seed=settings.seed,
    )


def request_bodies(model: str, settings: LoadSettings, *, count: int) -> list[bytes]:
    """So many requests, as JSON: made before the first is sent, for they take time."""
    common: dict[str, Any] = {
        "model": model,
        "max_tokens": settings.num_output_tokens,
        "temperature": settings.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if settings.ignore_eos:
        common["ignore_eos"] = True
    prompts = _prompts(settings, count)
    own: list[dict[str, Any]]
    if settings.endpoint == "chat":
        own = [{"messages": [{"role": "user", "content": prompt}]} for prompt in prompts]
    else:
        own = [{"prompt": prompt} for prompt in prompts]
    return [json.dumps(common | fields).encode() for fields in own]


def _prompts(settings: LoadSettings, count: int) -> Sequence[str | list[int]]:
    if settings.prompts_file is not None:
        return prompts_of_file(settings.prompts_file, count)
    if settings.endpoint == "chat":
        return random_texts(count, settings.num_prompt_tokens, settings.seed)
    return random_prompts(count, settings.num_prompt_tokens, settings.vocab_size, settings.seed)


def _first_model(listed: Any) -> str:
    try:
        return str(listed["data"][0]["id"])
    except (KeyError, IndexError, TypeError):
        raise BenchError(f"{MODELS} lists no model", fix="name one with --model") from None
