"""Hub ids: the local cache, what is asked for, and every refusal with a way out."""

import errno
from fnmatch import fnmatch
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from quantkit.errors import SourceError
from quantkit.formats.checkpoint import open_checkpoint
from quantkit.formats.hub import FILES, NOT_FILES, download
from tests.checkpoints import LLAMA_CONFIG, llama_tensors
from tests.hub_cache import COMMIT, write_hub_cache


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_what_is_in_the_cache_needs_no_network(tmp_path, revision):
    snapshot = write_hub_cache(tmp_path, "org/name", llama_tensors(), LLAMA_CONFIG)
    folder = download("org/name", revision=revision, cache=tmp_path, offline=True)
    assert folder == snapshot
    assert len(open_checkpoint(folder).tensors) == len(llama_tensors())


@pytest.mark.parametrize(("repo", "revision"), [("org/other", None), ("org/name", "v2")])
def test_what_is_not_in_the_cache_is_said_to_be_missing_there(tmp_path, repo, revision):
    write_hub_cache(tmp_path, "org/name", llama_tensors(), LLAMA_CONFIG)
    with pytest.raises(SourceError, match=f"{repo}.* is not completely in the local cache"):
        download(repo, revision=revision, cache=tmp_path, offline=True)


def test_an_interrupted_download_is_noticed_when_opened(tmp_path):
    snapshot = write_hub_cache(tmp_path, "org/name", llama_tensors(), LLAMA_CONFIG)
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(SourceError, match="no safetensors weights"):
        open_checkpoint(download("org/name", cache=tmp_path, offline=True))


def response(status: int) -> SimpleNamespace:
    """What the errors of huggingface_hub look at, whichever HTTP library it uses."""
    return SimpleNamespace(status_code=status, headers={}, request=None, text="")


FAILURES = {
    "no repository": (
        RepositoryNotFoundError("404", response=response(404)),
        "no public repository",
        "HF_TOKEN",
    ),
    "gated": (GatedRepoError("403", response=response(403)), "org/name is gated", "HF_TOKEN"),
    "no revision": (
        RevisionNotFoundError("404", response=response(404)),
        "has no revision v2",
        "branch, tag or",
    ),
    "server error": (
        HfHubHTTPError("500 Server Error", response=response(500)),
        "500 Server Error",
        "run the same",
    ),
    "offline": (OfflineModeIsEnabled("offline"), "hub cannot be reached", "HF_HUB_OFFLINE"),
    "not cached": (LocalEntryNotFoundError("no"), "hub cannot be reached", "HF_HUB_OFFLINE"),
    "bad name": (HFValidationError("Repo id must be"), "no valid hub id", "org/name"),
    "connection lost": (ConnectionResetError("reset by peer"), "reset by peer", "run the same command"),
    "time-out": (TimeoutError("timed out"), "timed out", "run the same command"),
    "anything else": (RuntimeError("xet\nlong story"), r"RuntimeError: xet\)", "run the same command"),
}


@pytest.mark.parametrize(("error", "finding", "fix"), FAILURES.values(), ids=FAILURES.keys())
def test_every_failure_says_what_to_do(monkeypatch, error, finding, fix):
    def fails(*_args, **_options):
        raise error

    monkeypatch.setattr("quantkit.formats.hub.snapshot_download", fails)
    with pytest.raises(SourceError, match=finding) as caught:
        download("org/name", revision="v2")
    assert fix in caught.value.fix
    assert "\n" not in caught.value.problem


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_and_an_interruption_are_not_the_hubs_fault(monkeypatch, error):
    def fails(*_args, **_options):
        raise error

    monkeypatch.setattr("quantkit.formats.hub.snapshot_download", fails)
    with pytest.raises(type(error)):
        download("org/name")


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("config.json", True),
        ("model.safetensors", True),
        ("model-00001-of-00002.safetensors", True),
        ("model.safetensors.index.json", True),
        ("tokenizer.json", True),
        ("tokenizer.model", True),
        ("tokenizer_config.json", True),
        ("chat_template.jinja", True),
        ("additional_chat_templates/tool_use.jinja", True),
        ("preprocessor_config.json", True),
        ("generation_config.json", True),
        ("pytorch_model.bin", False),
        ("model.pt", False),
        ("consolidated.safetensors", False),
        ("original/consolidated.00.pth", False),
        ("onnx/model.onnx", False),
        ("unet/model.safetensors", False),
        ("modeling_evil.py", False),
        ("tokenization_evil.py", False),
        ("tf_model.h5", False),
        ("model-q4.gguf", False),
    ],
)
def test_which_files_are_fetched(name, wanted):
    chosen = any(fnmatch(name, p) for p in FILES) and not any(fnmatch(name, p) for p in NOT_FILES)
    assert chosen == wanted
