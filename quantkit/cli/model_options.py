"""Options that every verb which runs a model has, declared once."""

from typing import Annotated

import typer

from quantkit.runtime.settings import DtypeName, EngineSettings, KVCacheDtypeName

DEFAULTS = EngineSettings()

Model = Annotated[str, typer.Argument(help="A folder, a hub id, a .gguf file, or `demo`; quantized or not.")]
Dtype = Annotated[DtypeName | None, typer.Option(help="Compute in it; default: the model's own.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default: a GPU if there is one.")]
KVCacheDtype = Annotated[
    KVCacheDtypeName, typer.Option(help="Store keys and values in it; auto: as the checkpoint says.")
]
MaxModelLen = Annotated[
    int | None, typer.Option(help="Tokens of prompt and answer; default: the model's limit.")
]
MaxNumSeqs = Annotated[int, typer.Option(help="Sequences computed at once.")]
MaxNumBatchedTokens = Annotated[
    int | None, typer.Option(help="Tokens of a step; default: 8192 on a GPU, 512 on a CPU.")
]
GpuMemoryFraction = Annotated[float, typer.Option(help="Of the GPU's memory, weights and KV cache together.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
