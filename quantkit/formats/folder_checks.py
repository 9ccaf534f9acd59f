"""What a checkpoint folder has to hold besides correct linears: whole files, an index that agrees, a tokenizer.

Everything that stops a folder from being opened at all is an error of `open_checkpoint`; this is about folders
that open and are wrong all the same.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from quantkit.errors import SourceError
from quantkit.formats.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint, read_json
from quantkit.formats.folder import PLAN_NAME
from quantkit.formats.journal import JOURNAL_NAME
from quantkit.formats.kv_cache import SIDECAR_NAME, StoredKV, read_kv_cache
from quantkit.formats.linear_checks import Finding
from quantkit.formats.safetensors_file import iter_bytes, read_header
from quantkit.schemes import Scheme
from quantkit.schemes.labels import kv_label, scheme_label

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def check_files(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Index against shards, stray weight files, tokenizer, a run that is not finished."""
    path = checkpoint.path
    if (path / JOURNAL_NAME).exists():
        yield Finding(
            JOURNAL_NAME, "the journal of an unfinished run", "none: run the same command again to finish it"
        )
    if not any((path / name).is_file() for name in TOKENIZERS):
        yield Finding("tokenizer.json", "missing", f"one of {', '.join(TOKENIZERS)}")
    index, shards = path / INDEX_NAME, {info.file.name for info in checkpoint.tensors.values()}
    if index.is_file():
        listed = read_json(index)["weight_map"]
        for name, info in checkpoint.tensors.items():
            if name not in listed:
                yield Finding(
                    name, f"in {info.file.name} but not in {INDEX_NAME}", "listed: loaders skip it otherwise"
                )
    for file in sorted(path.glob("model*.safetensors")):
        if file.name not in shards:
            yield Finding(
                file.name, "a weights file that the index does not name", f"in {INDEX_NAME}, or removed"
            )
    sidecar = path / SIDECAR_NAME
    if sidecar.is_file() and not index.is_file() and read_header(sidecar):
        expected = f"{INDEX_NAME} naming {SINGLE_NAME}: without it vLLM and SGLang load every *.safetensors"
        yield Finding(SIDECAR_NAME, "a second safetensors file and no index", expected)


def check_head(checkpoint: Checkpoint, heads: list[str], embeddings: list[str]) -> Iterator[Finding]:
    """Whether the output head is there, or tied to the embedding, as config.json says.

    heads, embeddings: names of their tensors.
    """
    tied = checkpoint.text_config.get("tie_word_embeddings", checkpoint.config.get("tie_word_embeddings"))
    if tied is False and not heads:
        yield Finding(
            "lm_head.weight", "missing", "an output head: config.json says tie_word_embeddings false"
        )
    if (
        tied is True
        and len(heads) == 1
        and len(embeddings) == 1
        and not _same_bytes(checkpoint, heads[0], embeddings[0])
    ):
        expected = (
            f"the same as {embeddings[0]}: config.json says tie_word_embeddings true, so loaders drop it"
        )
        yield Finding(heads[0], "a head of its own", expected)


def check_kv(checkpoint: Checkpoint) -> tuple[StoredKV | None, list[Finding]]:
    """The stored KV cache, and what is wrong with it."""
    try:
        kv = read_kv_cache(checkpoint)
    except SourceError as error:
        return None, [Finding("KV cache", error.problem, "a complete scheme with scales, or none")]
    if kv is not None and kv.scheme.dtype == "fp8":
        return kv, []
    left = [name for name in checkpoint.tensors if name.endswith((".k_scale", ".v_scale"))]
    return kv, [Finding(name, "a KV scale", "none: config.json has no kv_cache_scheme") for name in left]


def check_plan(
    checkpoint: Checkpoint,
    schemes: Mapping[str, Scheme | None],
    shapes: Mapping[str, tuple[int, int]],
    kv: StoredKV | None,
) -> Iterator[Finding]:
    """quantkit.json, if there is one, against what config.json and the tensors say of each linear.

    schemes, shapes: of every linear of the architecture.
    """
    if not (checkpoint.path / PLAN_NAME).is_file():
        return
    plan = read_json(checkpoint.path / PLAN_NAME)
    planned = plan.get("linears") if isinstance(plan, dict) else None
    if not isinstance(planned, dict) or not all(isinstance(entry, dict) for entry in planned.values()):
        yield Finding(PLAN_NAME, "no object of linears", "the resolved plan that quantize writes")
        return
    cache = None if kv is None else kv_label(kv.scheme)
    if plan.get("kv_cache") != cache:
        yield Finding(PLAN_NAME, f"kv_cache {plan.get('kv_cache')!r}", f"{cache!r}, as the checkpoint has it")
    for name in sorted(planned.keys() ^ schemes.keys()):
        where = "no such linear in the checkpoint" if name in planned else "missing"
        yield Finding(f"{PLAN_NAME}: {name}", where, "the linears of the checkpoint")
    for name in sorted(planned.keys() & schemes.keys()):
        scheme = schemes[name]
        label = None if scheme is None else scheme_label(scheme)
        yield from _check_planned(name, planned[name], label, shapes[name])


def _check_planned(
    name: str, entry: Mapping[str, Any], label: str | None, shape: tuple[int, int]
) -> Iterator[Finding]:
    if entry.get("scheme") != label:
        found = str(entry.get("scheme") or "16 bits")
        yield Finding(f"{PLAN_NAME}: {name}", found, f"{label or '16 bits'}, as config.json says")
    if entry.get("shape") != list(shape):
        yield Finding(f"{PLAN_NAME}: {name}", f"shape {entry.get('shape')}", f"{list(shape)}, as stored")


def _same_bytes(checkpoint: Checkpoint, first: str, second: str) -> bool:
    one, other = checkpoint.info(first), checkpoint.info(second)
    if (one.dtype, one.shape) != (other.dtype, other.shape) or one.dtype not in (
        torch.bfloat16,
        torch.float16,
        torch.float32,
    ):
        return False
    return all(a == b for a, b in zip(iter_bytes(one), iter_bytes(other), strict=True))
