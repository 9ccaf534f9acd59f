"""What a SOURCE means: folder, file, hub id or `demo`; and what is a mistake."""

import os
import subprocess
import sys

import pytest

from quantkit.errors import SourceError
from quantkit.formats.checkpoint import open_checkpoint
from quantkit.formats.source import resolve_source
from tests.checkpoints import LLAMA_CONFIG, llama_tensors, write_checkpoint
from tests.gguf_files import write_gguf
from tests.hub_cache import write_hub_cache


@pytest.fixture(autouse=True)
def _no_hub_and_a_cache_of_its_own(monkeypatch, tmp_path):
    def never(*_args, **_options):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("quantkit.formats.hub.snapshot_download", never)
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def test_a_folder_is_itself(tmp_path):
    folder = write_checkpoint(tmp_path / "model", llama_tensors(), LLAMA_CONFIG)
    assert resolve_source(str(folder)) == folder
    assert resolve_source("./model").resolve() == folder


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve_source("~/model") == tmp_path / "model"


@pytest.mark.parametrize(
    "source",
    [
        *("./org/name", "../org/name", "/org/name", "~/org/name", "~no-such-user/name", "name", "a/b/c"),
        *(
            "org/",
            "/name",
            "",
            "org/na me",
            "org/name.gguf",
            "org\\name",
            "-r/int4",
            "model.gguf",
            "x" * 5000,
        ),
    ],
)
def test_a_path_that_is_not_there_is_never_looked_for_on_the_hub(source):
    with pytest.raises(SourceError, match="no such file or folder") as caught:
        resolve_source(source)
    assert "\n" not in caught.value.problem


def test_a_mistake_below_a_folder_that_is_there_is_a_path(tmp_path):
    (tmp_path / "models" / "llama").mkdir(parents=True)
    with pytest.raises(SourceError, match="models/lama: no such file or folder"):
        resolve_source("models/lama")


def test_org_and_name_are_looked_for_on_the_hub(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        "quantkit.formats.hub.snapshot_download",
        lambda repo, **options: asked.append((repo, options)) or tmp_path,
    )
    assert resolve_source("org/name.v1-2_b", revision="v2") == tmp_path
    ((repo, options),) = asked
    assert (repo, options["revision"]) == ("org/name.v1-2_b", "v2")


@pytest.mark.parametrize("source", ["demo", ".", "model.gguf", "./org/name"])
def test_a_revision_is_for_the_hub_only(tmp_path, source):
    write_gguf(tmp_path / "model.gguf")
    with pytest.raises(SourceError, match="--revision main"):
        resolve_source(source, revision="main")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_of_a_checkpoint_gets_its_folder_named(tmp_path, name):
    write_checkpoint(tmp_path / "model", llama_tensors(), LLAMA_CONFIG)
    with pytest.raises(SourceError, match="is a file that is no checkpoint") as caught:
        resolve_source(f"model/{name}")
    assert "give the folder that holds it: model" in caught.value.fix


def test_a_gguf_is_converted_once_whatever_its_name(tmp_path):
    told = []
    file = write_gguf(tmp_path / "tiny.gguf")
    folder = resolve_source(str(file), announce=told.append)
    assert open_checkpoint(folder).config["architectures"] == ["LlamaForCausalLM"]
    assert folder.parent == tmp_path / "cache" / "converted"
    before = (folder / "model.safetensors").stat().st_mtime_ns
    file.rename(tmp_path / "other.GGUF")
    assert resolve_source("other.GGUF", announce=told.append) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert len(told) == 1
    assert str(file) in told[0]


def test_a_damaged_gguf_leaves_nothing_in_the_cache(tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(SourceError, match="truncated"):
        resolve_source(str(file))
    assert [path.name for path in (tmp_path / "cache" / "converted").iterdir() if path.is_dir()] == []


def test_a_hub_id_in_the_cache_works_offline(tmp_path):
    write_hub_cache(tmp_path / "hf" / "hub", "org/name", llama_tensors(), LLAMA_CONFIG)
    code = "from quantkit.formats.source import resolve_source; print(resolve_source('org/name'))"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    environment |= {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    folder = result.stdout.strip()
    assert "/models--org--name/snapshots/" in folder
