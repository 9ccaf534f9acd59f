"""Checkpoints on the Hugging Face hub, downloaded through its own cache; safetensors only."""

from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from quantkit.errors import SourceError

FILES = (
    "*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template*",
    "additional_chat_templates/*",
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
    "LICENSE*",
)
NOT_FILES = ("consolidated*.safetensors", "*/*.safetensors", "*.bin", "*.pt", "*.pth", "*.py")


def download(
    repo: str, *, revision: str | None = None, cache: Path | None = None, offline: bool | None = None
) -> Path:
    """The snapshot folder of a hub repository, downloading what the cache lacks.

    cache: None for huggingface_hub's own. offline: None for what HF_HUB_OFFLINE says. Raises SourceError with
    what to do about it: not found, gated, no such revision, no network and not in the cache; OSError if the
    disk is full or cannot be written.
    """
    try:
        folder = snapshot_download(
            repo,
            revision=revision,
            cache_dir=cache,
            local_files_only=constants.HF_HUB_OFFLINE if offline is None else offline,
            allow_patterns=list(FILES),
            ignore_patterns=list(NOT_FILES),
        )
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
            raise  # the disk, not the hub
        raise hub_error(repo, revision, error) from error
    return Path(folder)


def hub_error(repo: str, revision: str | None, error: Exception) -> SourceError:
    """What huggingface_hub raised, as a problem and a fix (some of its errors derive from others)."""
    named = f"{repo}, revision {revision}" if revision else repo
    if isinstance(error, GatedRepoError):
        return SourceError(
            f"{repo} is gated on the hub: its owner has to let you in",
            fix=f"accept the terms at https://huggingface.co/{repo}, then set HF_TOKEN to your token",
        )
    if isinstance(error, RevisionNotFoundError):
        return SourceError(
            f"{repo} has no revision {revision} on the hub",
            fix=f"give a branch, tag or full commit hash of https://huggingface.co/{repo}",
        )
    if isinstance(error, RepositoryNotFoundError):
        return SourceError(
            f"{repo} is no folder here and no public repository on the hub",
            fix="check the spelling; for a private repository set HF_TOKEN",
        )
    if isinstance(error, HFValidationError):
        return SourceError(
            f"{repo} is no valid hub id ({_first_line(error)})", fix="give org/name, or a folder"
        )
    if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        return SourceError(
            f"{named} is not completely in the local cache, and the hub cannot be reached",
            fix="check the network and unset HF_HUB_OFFLINE, or give a folder that holds the checkpoint",
        )
    return SourceError(
        f"{named}: the download failed ({_first_line(error)})",
        fix="check the network and run the same command again: finished files are kept",
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
