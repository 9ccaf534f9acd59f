"""A run's result does not depend on how it came about: shards, kills at every step, resuming, what is left."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from quantkit.errors import OutputError, SourceError
from quantkit.formats.checkpoint import open_checkpoint
from quantkit.formats.folder import FolderState, folder_state
from quantkit.formats.journal import JOURNAL_NAME, Journal
from quantkit.formats.shards import Limits
from quantkit.quantization import dry_run, quantize_checkpoint
from quantkit.quantization.linear import quantize_linear
from quantkit.recipe import load_recipe, make_plan
from tests.tiny_llama import tiny_tensors, write_tiny_llama

DATA_FREE = ("algorithm=rtn",)
SMALL = Limits(shard_bytes=12_000, commit_bytes=1, commit_seconds=0)


class Killed(BaseException):
    """What a kill looks like from inside."""


@pytest.fixture
def source(tmp_path) -> Path:
    """A tiny model with a nested file, a hidden one, a card, an extra tensor and a bias."""
    tensors = tiny_tensors() | {
        "model.extra.table": torch.arange(6.0).reshape(2, 3),
        "model.layers.0.self_attn.q_proj.bias": torch.ones(32, dtype=torch.bfloat16),
    }
    folder = write_tiny_llama(tmp_path / "source", tensors)
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "deep" / "er" / "processor.json").write_text("{}")
    (folder / ".cache").write_text("not copied")
    (folder / "README.md").write_text("the original's card")
    (folder / "training_args.bin").write_bytes(b"pickle")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """All files of a result but the log, which has dates."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "quantkit.log.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def quantize(source: Path, folder: Path, recipe: str = "int4-all", **options: object) -> None:
    """One run in small steps."""
    quantize_checkpoint(source, load_recipe(recipe, DATA_FREE), folder, limits=SMALL, **options)


def test_what_is_left(source, tmp_path):
    out = tmp_path / "out"
    quantize(source, out)
    names = set(content(out))
    assert {"config.json", "tokenizer.json", "quantkit.json", "README.md", "README.source.md"} <= names
    assert "deep/er/processor.json" in names
    assert not names & {".cache", "training_args.bin", JOURNAL_NAME}
    assert not [name for name in names if "partial" in name]
    plan = json.loads((out / "quantkit.json").read_text())
    linear = plan["linears"]["model.layers.0.mlp.down_proj"]
    assert linear["scheme"] == "INT4 group 32"
    assert 15 < linear["sqnr_db"] < 30
    assert plan["kept"]["lm_head.weight"]
    assert "not evaluated yet" in (out / "README.md").read_text().lower()
    assert json.loads((out / "quantkit.log.json").read_text())["peak_rss_bytes"] > 1e6


def test_shards_and_index_hold_every_tensor(source, tmp_path):
    out = tmp_path / "out"
    quantize(source, out)
    weight_map = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(weight_map.values())) >= 3
    seen = {}
    for shard in set(weight_map.values()):
        with safe_open(out / shard, framework="pt") as opened:
            seen |= dict.fromkeys(opened.keys(), shard)
    assert seen == weight_map
    checkpoint = open_checkpoint(out)
    assert torch.equal(checkpoint.read("model.extra.table"), torch.arange(6.0).reshape(2, 3))
    assert "model.layers.0.self_attn.q_proj.bias" in checkpoint.tensors
    assert "model.layers.0.self_attn.q_proj.weight" not in checkpoint.tensors


def test_the_same_run_gives_the_same_bytes(source, tmp_path):
    quantize(source, tmp_path / "a")
    quantize(source, tmp_path / "b")
    assert content(tmp_path / "a") == content(tmp_path / "b")


@pytest.mark.parametrize("recipe", ["int4-all", "int8-all", "fp8-all"])
def test_codes_do_not_depend_on_the_chunk(source, recipe):
    checkpoint = open_checkpoint(source)
    plan = make_plan(checkpoint, load_recipe(recipe, DATA_FREE))
    whole, _ = quantize_linear(checkpoint, plan.linears[0], plan.scale_dtype)
    parts, _ = quantize_linear(checkpoint, plan.linears[0], plan.scale_dtype, chunk_elements=100)
    assert torch.equal(whole.codes_NK.view(torch.uint8), parts.codes_NK.view(torch.uint8))
    assert torch.equal(whole.qparams.scale, parts.qparams.scale)


@pytest.mark.parametrize(
    "operation", ["os.pwrite", "os.fsync", "os.fdatasync", "os.write", "pathlib.Path.replace"]
)
def test_killed_before_any_step_it_continues_to_the_same_bytes(source, tmp_path, monkeypatch, operation):
    """Every call of one kind dies once; each time the run is started again, on what the others left."""
    import importlib

    quantize(source, tmp_path / "undisturbed")
    expected = content(tmp_path / "undisturbed")
    module_name, _, rest = operation.partition(".")
    owner = importlib.import_module(module_name)
    *path, name = rest.split(".")
    for part in path:
        owner = getattr(owner, part)
    real = getattr(owner, name)
    step, out = 0, tmp_path / "out"
    while True:
        calls = iter(range(10_000))

        def dying(*arguments, _calls=calls, _step=step, **options):
            if next(_calls) == _step:
                raise Killed
            return real(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, dying)
            try:
                quantize(source, out)
            except Killed:
                step += 1
                if step % 3:
                    continue  # on what the last two left
            else:
                break
        quantize(source, out)
        assert content(out) == expected
        quantize_checkpoint(source, load_recipe("int4-all", DATA_FREE), out, limits=SMALL, overwrite=True)
        assert content(out) == expected
        import shutil

        shutil.rmtree(out)
    assert step > 3
    assert content(out) == expected


def interrupted(source: Path, out: Path) -> None:
    """A run that stops in the middle."""

    def stop(step):
        if step.done_bytes > step.total_bytes / 2:
            raise Killed

    with pytest.raises(Killed):
        quantize(source, out, on_step=stop)
    assert folder_state(out) is FolderState.UNFINISHED


def test_an_unfinished_run_of_another_plan_or_source_is_refused(source, tmp_path):
    out = tmp_path / "out"
    interrupted(source, out)
    with pytest.raises(OutputError, match="another plan"):
        quantize(source, out, "int8-all")
    os.utime(source / "model.safetensors", ns=(1, 1))
    with pytest.raises(OutputError, match="another plan, source"):
        quantize(source, out)
    quantize(source, out, overwrite=True)
    assert folder_state(out) is FolderState.FINISHED


def test_a_source_that_breaks_meanwhile_costs_nothing(source, tmp_path):
    out = tmp_path / "out"
    interrupted(source, out)
    before = content(out)
    weights = source / "model.safetensors"
    raw, stamp = weights.read_bytes(), weights.stat().st_mtime_ns
    weights.write_bytes(raw[:-100])
    with pytest.raises(SourceError, match="truncated"):
        quantize(source, out)
    assert content(out) == before
    weights.write_bytes(raw)
    os.utime(weights, ns=(stamp, stamp))
    quantize(source, out)
    quantize(source, tmp_path / "undisturbed")
    assert content(out) == content(tmp_path / "undisturbed")


def test_a_finished_run_is_left_alone(source, tmp_path):
    out = tmp_path / "out"
    quantize(source, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    report = quantize_checkpoint(source, load_recipe("int4-all", DATA_FREE), out)
    assert report.was_finished
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_two_writers_do_not_meet(source, tmp_path):
    out = tmp_path / "out"
    interrupted(source, out)
    with Journal(out), pytest.raises(OutputError, match="another process"):
        quantize(source, out)


def test_weights_that_are_not_finite_leave_nothing(source, tmp_path):
    tensors = tiny_tensors()
    tensors["model.layers.1.mlp.down_proj.weight"][1, 2] = float("nan")
    broken = write_tiny_llama(tmp_path / "broken", tensors)
    with pytest.raises(SourceError, match="NaN"):
        quantize(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_dry_run_foretells_every_byte(source, tmp_path):
    plan = dry_run(source, load_recipe("int4-all", DATA_FREE))
    quantize_checkpoint(source, load_recipe("int4-all", DATA_FREE), tmp_path / "out")
    assert plan.after_bytes == open_checkpoint(tmp_path / "out").num_bytes
    assert plan.before_bytes == open_checkpoint(source).num_bytes
    assert {row.name for row in plan.rows} == set(open_checkpoint(source).tensors)
    assert plan.seconds > 0
    assert plan.peak_bytes > 1e6
    assert [verdict.loader for verdict in plan.loaders] == ["transformers", "vLLM", "SGLang"]
