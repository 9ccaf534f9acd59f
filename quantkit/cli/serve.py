"""`quantkit serve`: a model behind OpenAI's API."""

from typing import Annotated

import typer

from quantkit import env
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
from quantkit.runtime.settings import EngineSettings
from quantkit.server.settings import ServerSettings

SERVER = ServerSettings()


def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Listen here; 0.0.0.0: on every network.")] = SERVER.host,
    port: Annotated[int, typer.Option(help="0: a free one, which the log names.")] = SERVER.port,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            # a comma after the variable's name, and 80 columns have no room for all of it
            help="Ask clients for it; may be repeated. Else: those of QUANTKIT_API_KEYS (commas between them)."
        ),
    ] = None,
    served_model_name: Annotated[
        str | None,
        typer.Option(help="What clients call the model; default: the hub id, or the folder's name."),
    ] = SERVER.served_model_name,
    tool_call_parser: Annotated[
        str,
        typer.Option(
            help="How the model writes calls of tools: hermes, llama3_json; auto: as its chat template; none."
        ),
    ] = SERVER.tool_call_parser,
    max_waiting: Annotated[
        int, typer.Option(help="Sequences that may wait beyond --max-num-seqs, then 429.")
    ] = SERVER.max_waiting,
    max_waiting_tokens: Annotated[
        int, typer.Option(help="Tokens of prompts that may wait, then 429.")
    ] = SERVER.max_waiting_tokens,
    request_timeout: Annotated[float, typer.Option(help="Seconds for a request.")] = SERVER.request_timeout,
    drain_seconds: Annotated[
        float, typer.Option(help="For running requests to end after SIGTERM.")
    ] = SERVER.drain_seconds,
    engine_timeout: Annotated[
        float, typer.Option(help="Without the end of a step, after which /health says that the engine hangs.")
    ] = SERVER.engine_timeout,
    dtype: Dtype = DEFAULTS.dtype,
    device: Device = DEFAULTS.device,
    kv_cache_dtype: KVCacheDtype = DEFAULTS.kv_cache_dtype,
    max_model_len: MaxModelLen = DEFAULTS.max_model_len,
    max_num_seqs: MaxNumSeqs = DEFAULTS.max_num_seqs,
    max_num_batched_tokens: MaxNumBatchedTokens = DEFAULTS.max_num_batched_tokens,
    gpu_memory_fraction: GpuMemoryFraction = DEFAULTS.gpu_memory_fraction,
    prefix_caching: Annotated[
        bool, typer.Option(help="Keep what prompts have in common.")
    ] = DEFAULTS.prefix_caching,
    revision: Revision = None,
) -> None:
    """Answer OpenAI's API over HTTP until Ctrl-C or SIGTERM. Logs go to stderr, as JSON."""
    engine = EngineSettings(
        dtype=dtype,
        device=device,
        kv_cache_dtype=kv_cache_dtype,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        gpu_memory_fraction=gpu_memory_fraction,
        prefix_caching=prefix_caching,
    )
    settings = ServerSettings(
        host=host,
        port=port,
        api_keys=tuple(api_key) if api_key else env.api_keys(),
        served_model_name=served_model_name,
        tool_call_parser=tool_call_parser,
        max_waiting=max_waiting,
        max_waiting_tokens=max_waiting_tokens,
        request_timeout=request_timeout,
        drain_seconds=drain_seconds,
        engine_timeout=engine_timeout,
    )
    from quantkit.server.serve import serve

    raise typer.Exit(serve(model, engine, settings, revision=revision))
