"""What the user typed as SOURCE or MODEL, as a checkpoint folder on this machine."""

import re
from collections.abc import Callable
from pathlib import Path

from quantkit.env import cache_dir
from quantkit.errors import SourceError
from quantkit.formats.built_once import built_once
from quantkit.formats.demo import demo_checkpoint, sha256_of

DEMO = "demo"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
KINDS = "give a checkpoint folder, a .gguf file, a hub id (org/name), or `demo`"

Announce = Callable[[str], None]


def resolve_source(source: str, *, revision: str | None = None, announce: Announce | None = None) -> Path:
    """The checkpoint folder that `source` means: a folder, a .gguf file, a hub id, or `demo`.

    A GGUF file is converted to bf16 once, into QUANTKIT_CACHE; a hub id is downloaded into the hub's own
    cache. revision: branch, tag or commit, of a hub id only. announce: told, in a line, what will take a
    while. Raises SourceError if there is no such thing.
    """
    path, exists = _local_path(source)
    is_hub = source != DEMO and not exists and _looks_like_hub_id(source)
    if revision is not None and not is_hub:
        raise SourceError(f"--revision {revision}: {source} is not on the hub", fix="leave out --revision")
    if source == DEMO:
        return demo_checkpoint(announce=announce)
    if is_hub:
        from quantkit.formats.hub import download

        return download(source, revision=revision)
    if not exists:
        raise SourceError(f"{source}: no such file or folder", fix=KINDS)
    return path if path.is_dir() else _from_file(path, announce)


def _local_path(source: str) -> tuple[Path, bool]:
    """The path and whether it is there; the empty one is not (pathlib takes it for the current folder)."""
    try:
        path = Path(source).expanduser()
        return path, bool(source) and path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long, no such user, a zero byte, no permission
        raise SourceError(f"{source[:200]}: no such file or folder ({error})", fix=KINDS) from error


def _from_file(file: Path, announce: Announce | None) -> Path:
    if file.suffix.lower() == ".gguf":
        from quantkit.formats.gguf import convert_gguf  # transformers takes seconds to import

        def convert(folder: Path) -> None:
            if announce:
                announce(f"converting {file} to bf16, once, into {target}")
            convert_gguf(file.resolve(), folder)

        target = cache_dir() / "converted" / sha256_of(file)
        return built_once(target, convert)
    fix = KINDS
    if file.suffix in {".safetensors", ".json"}:
        fix = f"give the folder that holds it: {file.parent}"
    raise SourceError(f"{file} is a file that is no checkpoint", fix=fix)


def _looks_like_hub_id(source: str) -> bool:
    """org/name; where a folder `org` is here, it is taken for a path with a mistake in it instead."""
    if not HUB_ID.fullmatch(source) or source.endswith((".gguf", ".safetensors", ".json")):
        return False
    return not Path(source).parent.is_dir()
