"""Checkpoint folders: single and sharded, nested configs, and what is missing or inconsistent."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from quantkit.errors import SourceError
from quantkit.formats.checkpoint import INDEX_NAME, open_checkpoint
from tests.checkpoints import LLAMA_CONFIG, llama_tensors, write_checkpoint

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write_sharded(folder: Path, num_shards: int = 3) -> Path:
    """The Llama of tests.checkpoints in several shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    names = sorted(llama_tensors())
    for index in range(num_shards):
        shard = f"model-{index + 1:05}-of-{num_shards:05}.safetensors"
        part = {name: llama_tensors()[name] for name in names[index::num_shards]}
        save_file(part, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(dict(LLAMA_CONFIG)))
    return folder


def refusal(folder: Path) -> str:
    """The problem that opening raises, after checking that it is one printable line."""
    with pytest.raises(SourceError) as caught:
        open_checkpoint(folder)
    assert caught.value.problem.isprintable()
    assert str(folder) in caught.value.problem
    return caught.value.problem.removeprefix(str(folder))


def edit_index(folder: Path, change) -> None:
    index = json.loads((folder / INDEX_NAME).read_text())
    change(index["weight_map"])
    (folder / INDEX_NAME).write_text(json.dumps(index))


def test_one_file_and_several_are_the_same_checkpoint(tmp_path):
    single = open_checkpoint(write_checkpoint(tmp_path / "single", llama_tensors(), LLAMA_CONFIG))
    sharded = open_checkpoint(write_sharded(tmp_path / "sharded"))
    assert list(single.tensors) == list(sharded.tensors) == sorted(llama_tensors())
    assert all(torch.equal(sharded.read(name), tensor) for name, tensor in llama_tensors().items())
    assert single.content_hash() == sharded.content_hash()
    assert single.num_bytes == sum(tensor.nbytes for tensor in llama_tensors().values())


def test_the_content_hash_sees_every_byte_and_the_config(tmp_path):
    hashes = {open_checkpoint(write_checkpoint(tmp_path / "a", llama_tensors(), LLAMA_CONFIG)).content_hash()}
    tensors = llama_tensors()
    tensors["model.norm.weight"][-1] += 1
    hashes.add(open_checkpoint(write_checkpoint(tmp_path / "b", tensors, LLAMA_CONFIG)).content_hash())
    config = {**LLAMA_CONFIG, "rope_theta": 1.0}
    hashes.add(open_checkpoint(write_checkpoint(tmp_path / "c", llama_tensors(), config)).content_hash())
    assert len(hashes) == 3


def test_a_nested_text_config_is_the_language_models(tmp_path):
    nested = {"model_type": "llava", "text_config": dict(LLAMA_CONFIG)}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, llama_tensors(), nested))
    assert checkpoint.model_type == "llama"
    assert checkpoint.text_config["hidden_size"] == 64


def test_a_missing_tensor_is_named(tmp_path):
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, llama_tensors(), LLAMA_CONFIG))
    with pytest.raises(SourceError, match=r"tensor model\.nope\.weight is missing"):
        checkpoint.read("model.nope.weight")


def test_no_folder_and_no_config(tmp_path):
    assert "no such folder" in refusal(tmp_path / "nowhere")
    assert "no config.json" in refusal(tmp_path)


def test_a_diffusion_pipeline_is_refused_by_name(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    assert "a diffusion pipeline" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b"\xff\xfe", "not valid JSON"),
        (b'{"a": ' + b"[" * 100_000, "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_a_config_that_is_none(tmp_path, text, finding):
    write_checkpoint(tmp_path, llama_tensors(), LLAMA_CONFIG)
    (tmp_path / "config.json").write_bytes(text)
    assert finding in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "finding"),
    [
        ("pytorch_model.bin", "only pickled weights"),
        ("model.pt", "only pickled weights"),
        ("model-q4.gguf", "holds model-q4.gguf but no safetensors"),
        ("adapter.safetensors", "adapter.safetensors but neither"),
        ("README.md", "no safetensors weights"),
    ],
)
def test_other_weights_than_safetensors_are_named(tmp_path, name, finding):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"")
    assert finding in refusal(tmp_path)


def test_missing_shards_are_counted(tmp_path):
    folder = write_sharded(tmp_path)
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "1 of 3 shards missing, first model-00002-of-00003.safetensors" in refusal(folder)


def test_a_shard_without_what_the_index_promises(tmp_path):
    folder = write_sharded(tmp_path)
    edit_index(
        folder, lambda weights: weights.update({"model.extra.weight": "model-00001-of-00003.safetensors"})
    )
    assert "'model.extra.weight' is in model-00001-of-00003.safetensors, which does not hold it" in refusal(
        folder
    )


def test_a_tensor_in_two_shards(tmp_path):
    folder = write_sharded(tmp_path)
    save_file(llama_tensors(), folder / "again.safetensors")
    edit_index(folder, lambda weights: weights.update({"lm_head.weight": "again.safetensors"}))
    assert "is in two shards" in refusal(folder)


def test_a_truncated_shard_is_named(tmp_path):
    folder = write_sharded(tmp_path)
    shard = folder / "model-00003-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    assert "model-00003-of-00003.safetensors should be" in refusal(folder)


@pytest.mark.parametrize(
    "shard",
    [
        "../model.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "..",
        "",
        "x" * 300,
        "a\0b",
        "a\nb",
        "\ud800",
        None,
        3,
        [],
    ],
)
def test_a_shard_that_is_no_file_of_the_folder(tmp_path, shard):
    folder = write_sharded(tmp_path)
    edit_index(folder, lambda weights: weights.update({"lm_head.weight": shard}))
    assert "is said to be in" in refusal(folder)


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "3", "null"])
def test_an_index_without_a_map(tmp_path, index):
    folder = write_sharded(tmp_path)
    (folder / INDEX_NAME).write_text(index)
    assert "no weight_map" in refusal(folder)


def test_weights_without_a_tensor(tmp_path):
    write_checkpoint(tmp_path, {}, LLAMA_CONFIG)
    assert "no tensor at all" in refusal(tmp_path)


@FUZZ
@given(data=st.data())
def test_mutated_json_files_are_read_or_refused(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "fuzzed-checkpoint"
    if not folder.is_dir():
        write_sharded(folder, num_shards=2)
    name = data.draw(st.sampled_from(["config.json", INDEX_NAME]))
    original = (folder / name).read_bytes()
    mutated = bytearray(original)
    for _ in range(data.draw(st.integers(1, 3))):
        mutated[data.draw(st.integers(0, len(mutated) - 1))] = data.draw(st.integers(0, 255))
    try:
        (folder / name).write_bytes(
            mutated[: data.draw(st.integers(1, len(mutated)) | st.just(len(mutated)))]
        )
        open_checkpoint(folder)
    except SourceError as error:
        assert str(folder) in error.problem
        assert error.problem.isprintable()
    finally:
        (folder / name).write_bytes(original)
